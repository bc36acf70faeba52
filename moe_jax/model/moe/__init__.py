"""The mixture-of-experts layer.

    layer.py       MoE: the whole layer; SwitchableMoE and AllExpertsMoE; DenseFFN, its dense baseline
    router.py      chooses a token's experts and gates
    queues.py      the order in which the pairs of an expert get its slots
    dispatch.py    Capacity, Blocks, PerToken: bring tokens to experts and back; drop what has no slot
    experts.py     the feed-forward networks
    balance.py     the auxiliary losses and the balance bias

The capacity rule is `config.model.capacity`.
"""
