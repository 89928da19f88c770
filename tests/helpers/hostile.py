"""Make a model whose tokens are text that breaks a page without escaping."""

from __future__ import annotations

from npllama import load
from npllama.checkpoint import Model

HOSTILE = '</script><script>document.title="pwned"</script> "q" \'s\' $$x^2$$ <!-- & <b>bold</b>\n\\u003c 你 {{DATA}}'


class HostileTokenizer:
    """A tokenizer whose every token is HOSTILE: published ones may have </script> as one token, the embedded one doesn't."""

    vocab_size, silent_ids, special_tokens = 10**6, frozenset(), {}

    def token_bytes(self, id: int, opening: bool) -> bytes:
        """Return the bytes of any token."""
        return HOSTILE.encode()


def hostile_model() -> Model:
    """Load the embedded model with that tokenizer."""
    model = load()
    model.__dict__["tokenizer"] = HostileTokenizer()
    return model
