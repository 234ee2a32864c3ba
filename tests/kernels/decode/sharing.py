"""Makes the requests of a KVCase share a prefix, and plans that compute it once."""

from lctrain.kernels import make_decode_plan, make_shared_prefixes
from lctrain_kernels.decode.launch_config import decode_config


def share(inputs, case, requests, tokens):
    """Makes requests begin with the pages of the first of them, on the first `tokens` tokens."""
    table, page = inputs.options["block_table"], case.page
    leader = requests[0]
    for request in requests[1:]:
        table[request, : tokens // page] = table[leader, : tokens // page]
        inputs.keys[request, :tokens] = inputs.keys[leader, :tokens]
        inputs.values[request, :tokens] = inputs.values[leader, :tokens]


def plan_of(inputs, case, shared=None):
    """Returns the plan of a call, for the kernels on any device."""
    options = {"seqlen_q": case.seqlen_q, "new_tokens": case.new}
    lengths = inputs.options["cache_seqlens"]
    if lengths.device.type == "cuda":
        return make_decode_plan(
            *(lengths, inputs.options["block_table"].shape[1] * case.page),
            *(case.head_dim, inputs.q.dtype),
            causal=case.causal,
            shared_prefixes=shared,
            **options,
        )
    from lctrain_kernels.decode.launch_plan import fill_plan

    capacity = inputs.options["block_table"].shape[1] * case.page
    size = decode_config(inputs.q).split_size
    return fill_plan(lengths, None, capacity, size, shared=shared, **options)


def shared_of(inputs, case, **options):
    table, lengths = inputs.options["block_table"], inputs.options["cache_seqlens"]
    return make_shared_prefixes(
        table.cpu(), lengths.cpu(), case.page, device=table.device, **options
    )
