"""The mixture-of-experts layer.

    layer.py       MoE: the whole layer
    router.py      chooses a token's experts and gates, and the order in which the pairs of an expert get its slots;
                   the auxiliary losses and the balance bias
    dispatch.py    Capacity, Blocks, PerToken: bring tokens to experts and back; drop what has no slot
    experts.py     the feed-forward networks

The capacity rule is `config.model.capacity`.
"""
