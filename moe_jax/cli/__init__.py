"""The command line. `COMMANDS` in `command.py` says in which file each command is.

    main.py           starts a program: argv becomes a command, an error becomes one line and an exit status
    command.py        Command, the base class of commands, their list, and what they check
    arguments.py      argv becomes values; a wrong argument becomes one sentence
    settings.py       the settings of a run: preset, file, flags
    help.py           help

    train.py          train, fine-tune (`sft`)
    generate.py       write a text, chat                serve.py          answer over HTTP
    evaluate.py       score a text                      certify.py        test claims about a model
    runs.py           the list of runs
    inspect.py        the routing report, pictures, verified checkpoints
    import_model.py   a public model as a run
    export.py         a run for other programs, or with quantised weights
    plan.py           settings that fit a GPU
    benchmark.py      measure the costs

No file here imports jax before the arguments are accepted.
"""
