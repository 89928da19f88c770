"""Read foreign checkpoint formats and torch models. Installed as npllama_convert; only the command line imports it.

| file | what it does |
|---|---|
| sources.py | detects a checkpoint's kind and calls its reader |
| conversion.py | what all readers share: tensors in blocks of rows, checks, the writing of a model directory |
| meta.py | Meta's checkpoints |
| huggingface.py, quantised_folders.py | Hugging Face's folders; those with quantised matrices |
| gguf.py, gguf_blocks.py, gguf_vocabulary.py | llama.cpp's files: tensors, quantised blocks, tokenizers |
| llama2c.py | karpathy/llama2.c's files |
| torch_file.py | files that torch.save wrote |
| lora.py | LoRA adapters, merged into their base |
| templates.py | chat templates of checkpoints |
| published.py | the constants of published models |
| hub.py | repositories of the Hugging Face hub |
| registry.py, fetch.py | checkpoints inside Python packages, and how they are fetched |
| stored.py | conversion into the user's store |
| capture.py, llamacpp.py | activations of a torch model, and of llama.cpp, as a trace |
| train_demo.py | trains the embedded model |
"""
