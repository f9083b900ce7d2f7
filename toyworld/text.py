"""The small text encoder for training, and the tokenizer of the small world's words.

The host's CLIP layers add in place, which autograd does not allow. Training therefore uses this copy, with the parameter names
and the mathematics of `comfy.clip_model.CLIPTextModel`. A test compares both.
"""
from __future__ import annotations

import torch
from torch import nn

from .config import END, LENGTH, START, TEXT_CONFIG
from .scenes import CARDINALS, DIAGONALS, EXTRA_NOUNS, NOUNS, SYNONYMS


def known_words() -> tuple[str, ...]:
    """Every word and punctuation mark of the small world's captions and prompts, sorted."""
    phrases = NOUNS + EXTRA_NOUNS + CARDINALS + DIAGONALS + tuple(form for pair in SYNONYMS.values() for form in pair)
    extra = "a an the photo of and picture is are with , . ; beside near next underneath"
    return tuple(sorted(set(" ".join(phrases + (extra,)).split())))


class WordTokenizer:
    """Maps captions to rows of the small embedding table, with the real CLIP tokenizer, which splits words independently.

    ids: CLIP token id of each row.
    """

    def __init__(self) -> None:
        from comfy.sd1_clip import SDTokenizer

        tokenizer = SDTokenizer()
        words = {word: [token for token, _ in tokenizer.tokenize_with_weights(word)[0] if token not in (START, END)]
                 for word in known_words()}
        self.ids = sorted({token for tokens in words.values() for token in tokens} | {START, END})
        row = {token: index for index, token in enumerate(self.ids)}
        self._rows = {word: [row[token] for token in tokens] for word, tokens in words.items()}
        self._start, self._end = row[START], row[END]

    def rows(self, captions: list[str]) -> torch.Tensor:
        """Row indices [B, 77]: the start token, the words, then end tokens as padding, as in CLIP."""
        batch = torch.full((len(captions), LENGTH), self._end, dtype=torch.long)
        for index, caption in enumerate(captions):
            rows = [self._start] + [row for word in caption.replace(",", " ,").split() for row in self._rows[word]]
            batch[index, :len(rows)] = torch.tensor(rows)
        return batch


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for layer in (self.q_proj, self.k_proj, self.v_proj))
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        weights = scores.float().masked_fill(future, float("-inf")).softmax(dim=-1).to(v.dtype)
        return self.out_proj((weights @ v).transpose(1, 2).flatten(2))


class _MLP(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.layer_norm1, self.self_attn = nn.LayerNorm(width), _Attention(width, heads)
        self.layer_norm2, self.mlp = nn.LayerNorm(width), _MLP(width, inner)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class _Embeddings(nn.Module):
    def __init__(self, width: int, rows: int) -> None:
        super().__init__()
        self.token_embedding, self.position_embedding = nn.Embedding(rows, width), nn.Embedding(LENGTH, width)
        nn.init.normal_(self.token_embedding.weight, std=0.5)
        nn.init.normal_(self.position_embedding.weight, std=0.1)


class _Encoder(nn.Module):
    def __init__(self, config: dict) -> None:
        super().__init__()
        shape = (config["hidden_size"], config["num_attention_heads"], config["intermediate_size"])
        self.layers = nn.ModuleList(_Layer(*shape) for _ in range(config["num_hidden_layers"]))


class TextTransformer(nn.Module):
    """Row indices [B, 77] -> hidden states [B, 77, width]. Parameter names are those of the host's `CLIPTextModel_`."""

    def __init__(self, rows: int, config: dict = TEXT_CONFIG) -> None:
        super().__init__()
        self.embeddings = _Embeddings(config["hidden_size"], rows)
        self.encoder = _Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config["hidden_size"])

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        x = self.embeddings.token_embedding(rows) + self.embeddings.position_embedding.weight
        for layer in self.encoder.layers:
            x = layer(x)
        return self.final_layer_norm(x)
