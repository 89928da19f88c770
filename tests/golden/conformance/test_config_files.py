"""Check the files that state constants: what each leaves out is not judged, and the rest is the model's."""

from __future__ import annotations

import numpy as np
import pytest

from npllama.golden.conformance.config_files import CONSTANTS, LLAMA_3_1_8B, config_files, constants_of, vector_of


def test_every_form_and_spelling_is_there():
    names = [path.rpartition("/")[2] for path in config_files()]
    assert {"config.json", "params.json", "model.gguf"} == set(names)
    texts = [file.data.decode() for path, file in config_files().items() if path.endswith("config.json")]
    assert any('"rope_parameters"' in text for text in texts)
    assert any('"rope_scaling"' in text and '"rope_parameters"' not in text for text in texts)


def test_the_vector_is_the_config():
    found = dict(zip(CONSTANTS, constants_of(LLAMA_3_1_8B), strict=True))
    assert found["norm_eps"] == 1e-5
    assert found["factor"] == 8
    assert found["original_max_seq_len"] == 8192
    assert found["tied_embeddings"] == 0
    assert np.array_equal(vector_of(LLAMA_3_1_8B.to_dict()), constants_of(LLAMA_3_1_8B))


@pytest.mark.parametrize("path", [path for path in config_files() if path.endswith("config.json")])
def test_transformers_reads_the_same(path, tmp_path):
    """Read with transformers, which needs torch for models but not for a config."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    file = config_files()[path]
    (tmp_path / "config.json").write_bytes(file.data)
    found = transformers.LlamaConfig.from_pretrained(tmp_path)
    rope = found.rope_parameters
    assert found.rms_norm_eps == file.config.norm_eps
    assert rope["rope_theta"] == file.config.rope_theta
    assert rope.get("factor") == (file.config.rope_scaling.factor if file.config.rope_scaling else None)
    assert (found.num_attention_heads, found.num_key_value_heads) == (file.config.n_heads, file.config.n_kv_heads)
    assert found.head_dim == file.config.head_dim
    assert found.tie_word_embeddings == file.config.tied_embeddings
