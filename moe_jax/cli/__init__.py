"""The command line. Each command is a thin file of its name.

    main.py           starts a program: argv becomes a command, an error becomes one line and an exit status
    command.py        Command, the base class of commands, and the list of commands
    arguments.py      argv becomes values; a wrong argument becomes one sentence
    settings.py       the settings of a run: preset, file, flags
    settings_file.py  `--config FILE.toml`
    help.py           help, and completion in shells

    train.py          train a run                       certify.py     test claims about a model
    generate.py       write texts                       plot.py        draw pictures of runs
    evaluate.py       score a text                      compare.py     train a model and its dense baselines
    inspect.py        write the routing report          samples.py     write and measure texts
    plan.py           settings that fit a GPU           benchmark.py   measure the costs
    doctor.py         verify and repair checkpoints     completion.py  print a completion script
    verify_resume.py  kill, resume and compare a run

No file here imports jax before the arguments are accepted.
"""
