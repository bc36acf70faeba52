"""The commands: one file a command, one function each. tyro turns the function's parameters into flags.

    main.py        finds the command, and turns an error into one line and an exit status
    settings.py    the flags of a run's settings, and what the run starts from
    options.py     parameters that commands share, and checks of outputs

The arguments are accepted first. Only then does a command import what it needs, jax included. Commands do not import
each other.
"""
