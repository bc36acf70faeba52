"""The command line. Each command is a thin file of its name.

    main.py           starts a program: argv becomes a command, an error becomes one line and an exit status
    command.py        Command, the base class of commands, and the list of commands
    arguments.py      argv becomes values; a wrong argument becomes one sentence
    settings.py       the settings of a run: origin, file, flags
    origin.py         the start of the settings: a preset, a run, or a model
    settings_file.py  `--config FILE.toml`
    auto_preset.py    `--preset auto`: a preset and steps for a text
    sampling.py       how text is drawn, for `generate` and `chat`
    memory.py outputs.py   settings and outputs that cannot be are refused first
    result.py         the end of an output: the next command, JSON
    help.py           help, and completion in shells

    train.py          train a run                       verify_resume.py  kill, resume and compare a run
    generate.py       write a text                      certify.py        test claims about a model
    chat.py           text after text                   plot.py           draw pictures of runs
    evaluate.py       score a text                      inspect.py        write the routing report
    presets.py        what each preset costs            benchmark.py      measure the costs
    plan.py           settings that fit a GPU, a text   completion.py     print a completion script
    export.py         a model for other programs        serve.py          answer over HTTP
    sft.py            fine-tune on conversations        merge.py          adapters become weights
    quantize.py       weights of 8 or 4 bits            doctor.py         verify and repair checkpoints

No file here imports jax before the arguments are accepted.
"""
