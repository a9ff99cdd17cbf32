"""CUDA graphs: a training step, and one token of decoding, recorded once and then replayed without Python in between.

    step = peftfast.capture_training_step(model, batch, autocast=torch.bfloat16)
    for batch in batches:
        loss = step(batch)       # forward and backward; gradients lie in `.grad`
        optimizer.step()

    decode = peftfast.capture_decoding(model, batch_size=8, max_length=2048, mixed=True)
    tokens = decode.generate(input_ids, max_new_tokens=128, adapter_names=["a", "b", ...])

Inputs are copied into buffers that never move, results are read from such buffers. The first calls run as they would
without a graph, on a stream of their own: they are the warm-up that capture needs, and being ordinary steps they leave
nothing to undo, neither in the weights nor in the random generator. On a device without CUDA graphs all calls do that.

What is recorded is what the model was at that moment. Every call compares: modules, the addresses of all parameters,
adapters (present, active, merged, scales), train or eval mode. A difference is an error or a new capture, as chosen.

Not captured, because the host decides or waits: gradient checkpointing that preserves the random state, routers in
training, sliding-window caches, prompts in front of the input; and whatever else synchronises, which
capture then says. Of bitsandbytes bases, NF4 asks nothing of the host, neither in adapted layers, which decode it here,
nor in others; bitsandbytes' own LLM.int8 product looks for outliers on a GPU. Its optimizers count steps on the host:
leave those outside. While a stream is captured, transformers makes explicit attention masks instead of looking whether
there is padding: with SDPA that is another kernel than in the warm-up, equal but for rounding.
"""
