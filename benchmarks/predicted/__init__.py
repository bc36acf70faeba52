"""Times that are predicted and never measured: what `plan_pods.py` and `predict_card.py` compute.

    kernels.py        the kernels of a compiled program, and the memory that each reads and writes
    roofline.py       the time of a program, predicted from its kernels
    card_parts.py     the parts that `predict_card.py` compares with a card
    ahead_of_time.py  a step compiled for many GPUs or TPUs that need not be there
    interconnect.py   their links, and the time of a collective
    tpu.py            slices of TPUs
    tpu_programs.py   products and loops as only a TPU's compiler writes them
    many_devices.py   a step on many devices, and the table of 1, 2, 4, ... devices
    picture.py        the picture of this table

The rates are assumptions. No card and no TPU has confirmed one.
"""
