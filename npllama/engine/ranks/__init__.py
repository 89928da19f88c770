"""Compute one forward pass with several processes, each with its share of every matrix: tensor parallelism.

Shoeybi et al. 2019 (Megatron-LM, arXiv:1909.08053); Meta's reference does the same with fairscale. A rank is one of the
processes. It has some of the heads, of the feed-forward's channels and of the vocabulary, and runs model.py on its share as if
that were a model. The ranks exchange two sums in each layer (all-reduce) and the logits (all-gather).

| file | what it does |
|---|---|
| shares.py | the heads, channels and rows of each rank; its part of the parameters |
| groups.py | the operations of a group of ranks: sum, gather, broadcast |
| passes.py | parameters that are spread over ranks: model.forward() over them is a pass by all ranks |
| local.py | the ranks as processes of one machine, with shared memory |
| mpi.py | the ranks as processes that mpiexec has started, on several machines |
| leading.py | rank 0: announces each pass to the others; gathers activations for a tap |
| following.py | the program of the other ranks |
"""
