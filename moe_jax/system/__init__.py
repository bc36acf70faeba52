"""Services that the other rooms use.

    environment.py, limits.py      what is settled before jax starts
    signals.py, interrupts.py      how a program ends: at a signal, and at Ctrl-C
    streams.py, terminal_text.py   what it prints on, and lines that fit a terminal
    errors.py                      the errors that a user can mend
    folders.py, files.py           files read and written without following links, in one step, under a lock
    step_names.py, json_text.py    names of steps; JSON
    console.py, rich_console.py    notes, progress and tables
    compile_cache.py               compiled programs that are kept on disk
    random_keys.py                 random keys by purpose
    hlo_text.py                    the text of compiled programs, as computations and instructions
    hlo.py, hlo_kernels.py         what it says: products and buffers; kernels of a GPU and their traffic
    machine.py, timing.py          the machine, and times
    race.py                        which of two precisions this machine multiplies faster

What runs before jax imports only the standard library.
"""
