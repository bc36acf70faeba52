"""The mixture-of-experts layer.

    layer.py       MoE: the whole layer; DenseFFN, its dense baseline
    router.py      chooses a token's experts and gates
    queues.py      the order in which the pairs of an expert get its slots
    dispatch.py    Capacity, Blocks, PerToken: bring tokens to experts and back; drop what has no slot
    experts.py     the feed-forward networks
    balance.py     the auxiliary losses and the balance bias
    variants.py    noise, jitter, and the priorities that leak the future
    switchable.py  a layer whose experts can be switched off while its program runs
    functional.py  a layer as a plain function of its parameters
    reference.py   two slow dispatches, which the tests compare the fast ones with

The capacity rule is `config.model.capacity`.
"""
