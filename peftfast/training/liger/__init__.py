"""Liger's Triton kernels (the optional package `liger-kernel`) on one model: RMSNorm, rotary embedding, cross-entropy.

    liger = peftfast.use_liger(model)
    print(liger.report())
    liger.remove()                      # every module as before

Liger's own `apply_liger_kernel_to_*` replaces names in transformers' modules (`apply_rotary_pos_emb`, even
`torch.nn.functional.cross_entropy`), for every model of the process, also when it is given a model. Here only instances
change: a norm's `forward`; an attention's `forward`, which is the class's own code with another rotary function among
its globals; the model's loss function. Each is compared with what it replaces, value and gradient, and left alone where
they differ (a norm with `1 + weight`, as Gemma's, is recognised by that comparison).

The fused linear cross-entropy multiplies by the head's weight itself and never calls the head. It is used only while
the head is an untouched `torch.nn.Linear`: on an adapted head it would train without the adapter. A training step then
has no `logits` in its output. Liger's losses count labels on the host, so `capture_training_step` cannot record them.
Remove Liger before pickling a model as a whole; copies and state dicts are as always.
"""
