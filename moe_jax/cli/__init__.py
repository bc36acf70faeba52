"""The command line. `COMMANDS` in `command.py` says in which file each command is.

    main.py           starts a program: argv becomes a command, an error becomes one line and an exit status
    command.py        Command, the base class of commands, and the list of commands
    arguments.py      argv becomes values; a wrong argument becomes one sentence
    settings.py       the settings of a run: preset, file, flags
    auto_preset.py    a preset and steps for a text: `--preset auto`, and plans for a text
    checks.py         outputs and settings that cannot be are refused first
    help.py           help, and completion in shells

    train.py          train, fine-tune (`sft`), verify-resume
    generate.py       write a text, chat                serve.py          answer over HTTP
    evaluate.py       score a text                      certify.py        test claims about a model
    inspect.py        the routing report, pictures, verified checkpoints
    export.py         a run for other programs, with merged adapters, or with quantised weights
    plan.py           settings that fit a GPU, a text   presets.py        what each preset costs
    benchmark.py      measure the costs

No file here imports jax before the arguments are accepted.
"""
