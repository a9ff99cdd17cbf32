"""What training needs from a model with adapters: checkpointed blocks, shards, averages, shared reads of an input,
CUDA graphs, Liger's kernels."""
