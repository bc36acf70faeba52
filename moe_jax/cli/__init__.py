"""The command line. `COMMANDS` in `command.py` says in which file each command is.

    main.py           starts a program: argv becomes a command, an error becomes one line and an exit status
    command.py        Command, the base class of commands, and the list of commands
    arguments.py      argv becomes values; a wrong argument becomes one sentence
    settings.py       the settings of a run: preset, file, flags
    auto_preset.py    `--preset auto`: a preset and steps for a text
    sampling.py       how text is drawn, for `generate` and `chat`
    checks.py         outputs and settings that cannot be are refused first
    help.py           help, and completion in shells

    train.py          train, fine-tune (`sft`), verify-resume
    derive.py         merge adapters, quantize weights
    evaluate.py       score a text                      inspect.py        write the routing report
    generate.py       write a text                      certify.py        test claims about a model
    chat.py           text after text                   plot.py           draw pictures of runs
    serve.py          answer over HTTP                  doctor.py         verify and repair checkpoints
    presets.py        what each preset costs            benchmark.py      measure the costs
    plan.py           settings that fit a GPU, a text   completion.py     print a completion script
    export.py         a model for other programs

No file here imports jax before the arguments are accepted.
"""
