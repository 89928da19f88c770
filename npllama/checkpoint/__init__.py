"""The model directory: written whole or not at all, opened memory-mapped, verified by sha256.

| file | what it does |
|---|---|
| format.py | the directory's files, how numbers are stored, the manifest and its checks |
| reading.py | load() and open_model(), the Model, the demo model |
| writing.py | create() and its Writer: rounding, checking, hashing |
| verifying.py | verify() and sha256() |
| atomic.py | a folder or a file that is written whole or not at all |
| foreign.py | readers of files that other programs wrote: JSON, .npy, .npz, .safetensors |
| store.py | the folder of fetched models, and their names |
"""

from .foreign import JSON_LIMIT
from .format import (
    FORMAT_VERSION,
    STORAGE,
    TOKENIZER_FILES,
    CheckpointError,
    Storage,
    check_names,
    is_plain_name,
    read_json,
    setting_fault,
    stored_bytes,
    takes_int8,
    tensor_bytes,
)
from .reading import Model, demo_path, load, open_model
from .verifying import sha256, verify
from .writing import Writer, check_free, create

__all__ = [
    "FORMAT_VERSION",
    "JSON_LIMIT",
    "STORAGE",
    "TOKENIZER_FILES",
    "CheckpointError",
    "Model",
    "Storage",
    "Writer",
    "check_free",
    "check_names",
    "create",
    "demo_path",
    "is_plain_name",
    "load",
    "open_model",
    "read_json",
    "setting_fault",
    "sha256",
    "stored_bytes",
    "takes_int8",
    "tensor_bytes",
    "verify",
]
