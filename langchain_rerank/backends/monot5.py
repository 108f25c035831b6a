"""monoT5: rerankers that answer "true" or "false"."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, PrivateAttr, field_validator, model_validator
from typing_extensions import Self

from langchain_rerank.backends._files import ModelFiles
from langchain_rerank.backends._torch import TorchBackend
from langchain_rerank.backends.local import Batch, Encoding, Logits
from langchain_rerank.errors import ConfigurationError, ModelLoadError

if TYPE_CHECKING:
    import tokenizers

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wording:
    """What a model was trained to read, and the two vocabulary pieces that it answers with."""

    true: str
    """A relevant text's piece; `▁` begins a word."""

    false: str
    """Any other text's piece."""

    prompt: str = "Query: {query} Document: {text} Relevant:"
    """What the encoder reads. Only the text is ever cut, so that what follows it is always there."""

    def parts(self) -> tuple[str, str, str]:
        """What stands before the query, between query and text, and after the text."""
        before, rest = self.prompt.split("{query}")
        between, after = rest.split("{text}")
        return before, between, after


_ENGLISH = Wording("▁true", "▁false")
_MULTILINGUAL = Wording("▁yes", "▁no")
_PTT5 = Wording("▁sim", "▁não")
_MONOPTT5 = Wording("▁Sim", "▁Não", "Pergunta: {query} Documento: {text} Relevante:")

MODELS: Mapping[str, Wording] = {
    "castorini/monot5-small-msmarco-10k": _ENGLISH,
    "castorini/monot5-small-msmarco-100k": _ENGLISH,
    "castorini/monot5-base-msmarco": _ENGLISH,
    "castorini/monot5-base-msmarco-10k": _ENGLISH,
    "castorini/monot5-base-med-msmarco": _ENGLISH,
    "castorini/monot5-large-msmarco": _ENGLISH,
    "castorini/monot5-large-msmarco-10k": _ENGLISH,
    "castorini/monot5-3b-msmarco": _ENGLISH,
    "castorini/monot5-3b-msmarco-10k": _ENGLISH,
    "castorini/monot5-3b-med-msmarco": _ENGLISH,
    "unicamp-dl/InRanker-small": _ENGLISH,
    "unicamp-dl/InRanker-base": _ENGLISH,
    "unicamp-dl/InRanker-3B": _ENGLISH,
    "Dundalia/TWOLAR-large": _ENGLISH,
    "Dundalia/TWOLAR-xl": _ENGLISH,
    "unicamp-dl/mt5-base-en-msmarco": _MULTILINGUAL,
    "unicamp-dl/mt5-base-en-pt-msmarco-v1": _MULTILINGUAL,
    "unicamp-dl/mt5-base-en-pt-msmarco-v2": _MULTILINGUAL,
    "unicamp-dl/mt5-base-mmarco-v1": _MULTILINGUAL,
    "unicamp-dl/mt5-base-mmarco-v2": _MULTILINGUAL,
    "unicamp-dl/mt5-3B-mmarco-en-pt": Wording("▁true", "▁"),
    "unicamp-dl/ptt5-base-pt-msmarco-10k-v1": _PTT5,
    "unicamp-dl/ptt5-base-pt-msmarco-10k-v2": _PTT5,
    "unicamp-dl/ptt5-base-pt-msmarco-100k-v1": _PTT5,
    "unicamp-dl/ptt5-base-pt-msmarco-100k-v2": _PTT5,
    "unicamp-dl/ptt5-base-en-pt-msmarco-10k-v1": _PTT5,
    "unicamp-dl/ptt5-base-en-pt-msmarco-100k-v2": _PTT5,
    "unicamp-dl/monoptt5-small": _MONOPTT5,
    "unicamp-dl/monoptt5-base": _MONOPTT5,
    "unicamp-dl/monoptt5-large": _MONOPTT5,
    "unicamp-dl/monoptt5-3b": _MONOPTT5,
}
"""The published models by their name on the hub.

- castorini, mt5 and ptt5: https://github.com/castorini/pygaggle/blob/master/pygaggle/rerank/transformer.py;
  its small ones and monot5-3b-msmarco: https://github.com/zetaalphavector/InPars/blob/master/inpars/rerank.py
- InRanker and the pieces of monoptt5: https://github.com/AnswerDotAI/rerankers/blob/main/rerankers/models/t5ranker.py;
  the prompt of monoptt5, by its author: https://github.com/AnswerDotAI/rerankers/pull/16
- TWOLAR, whose own score is our logit: https://github.com/Dundalia/TWOLAR/blob/main/utils.py

unicamp-dl/mt5-13b-mmarco-100k is not among them: pygaggle says that its "false" is `▁false`, rerankers says `▁`.
"""

_FAMILY = ("t5", "mt5")

_WHOLE_MODELS = ("ForConditionalGeneration", "WithLMHeadModel", "T5Model")
"""How the classes end whose checkpoints hold encoder and decoder; castorini's large and 3B ones name `T5Model`."""


class MonoT5Backend(TorchBackend):
    """Probability that T5 answers "true" to `Query: ... Document: ... Relevant:`.

    Softmax over the "true" and "false" logits of the first decoder step, shape (n, 2) to (n,): the sigmoid of their
    difference, which is the logit here. Weights in a `pytorch_model.bin` are read with torch's `weights_only`,
    whatever `model_kwargs` says.
    Nogueira et al., 2020, https://arxiv.org/abs/2003.06713
    """

    requires: ClassVar[tuple[str, ...]] = ("torch", "transformers", "sentencepiece", "google.protobuf")
    extra: ClassVar[str] = "monot5"

    model: str = "castorini/monot5-base-msmarco-10k"
    """A name of `MODELS`; or any other T5 or mT5, or a folder, with its `true_token` and `false_token`. The default
    is what its authors recommend for texts other than MS MARCO's."""

    true_token: str | None = None
    """The vocabulary piece of a relevant text, such as `"▁true"`. `None` takes the one of `MODELS`."""

    false_token: str | None = None
    """The vocabulary piece of any other text, such as `"▁false"`. `None` takes the one of `MODELS`."""

    prompt: str | None = None
    """What the model was trained to read, with `{query}` before `{text}`. `None` takes the one of `MODELS`,
    else monoT5's `Query: {query} Document: {text} Relevant:`."""

    max_length: int = Field(default=512, ge=64)
    """Most tokens of the whole prompt. Only the text is cut; a query over three quarters of this is cut to that
    first, and reported. T5 has no last position, but was trained on 512."""

    _start: int = PrivateAttr(default=0)
    _pad: int = PrivateAttr(default=0)
    _head: Any = PrivateAttr(default=None)

    @property
    def name(self) -> str:
        """The backend's name in traces."""
        return "monot5"

    @field_validator("prompt")
    @classmethod
    def _has_places(cls, prompt: str | None) -> str | None:
        if prompt is not None:
            places = [prompt.find("{query}"), prompt.find("{text}")]
            once = prompt.count("{query}") == prompt.count("{text}") == 1
            if not once or places != sorted(places):
                raise ConfigurationError(f"prompt {prompt!r} must hold {{query}}, then {{text}}, each once")
        return prompt

    @model_validator(mode="after")
    def _has_answers(self) -> Self:
        if self.model not in MODELS and not (self.true_token and self.false_token):
            raise ConfigurationError(
                f"no answers are known for {self.model!r}: give true_token and false_token, the vocabulary pieces that "
                "it was trained to answer with (of castorini's models '▁true' and '▁false'), and its prompt if it has "
                "one of its own. A folder needs them too"
            )
        if self._wording.true == self._wording.false:
            raise ConfigurationError(f"true_token and false_token are both {self._wording.true!r}")
        return self

    @property
    def _wording(self) -> Wording:
        given = {"true": self.true_token, "false": self.false_token, "prompt": self.prompt}
        return replace(MODELS.get(self.model, _ENGLISH), **{name: value for name, value in given.items() if value})

    def _load(self) -> None:
        from transformers import AutoConfig, AutoTokenizer

        self._pick_device()
        self._check_dtype()
        with self._loading():
            config = AutoConfig.from_pretrained(self.model, **self._source())
            self._check(config)
            tokenizer = AutoTokenizer.from_pretrained(self.model, **self._source())
            self._tokenizer = self._backend_tokenizer(tokenizer)
            answers = [self._id_of(piece, tokenizer) for piece in (self._wording.false, self._wording.true)]
            model = self._weights(config)
        start = getattr(config, "decoder_start_token_id", None)
        self._start = config.pad_token_id if start is None else start
        self._model = self._without_head(model, answers).eval().to(self._device)

    def _weights(self, config: Any) -> Any:
        """The whole model, none of it made up, and no code run to read it."""
        from transformers import AutoModelForSeq2SeqLM

        model = self._pretrained(AutoModelForSeq2SeqLM, config)
        written = ModelFiles(self.model, self.revision or "main", self.local_files_only).read_json("config.json") or {}
        # transformers 5 takes the embeddings where a head of its own is not there, and does not call it missing.
        if written.get("tie_word_embeddings") is False and model.lm_head.weight is model.shared.weight:
            self._refuse_random(["lm_head.weight"])
        return model

    def _check_dtype(self) -> None:
        if self.dtype != "float16":
            return
        if self._device.type != "cuda":
            raise ConfigurationError("T5 overflows in dtype 'float16'; use 'auto', 'bfloat16' or 'float32'")
        logger.warning("%s: T5 may overflow in float16, which is an error then; bfloat16 has the range", self.name)

    def _check(self, config: Any) -> None:
        if config.model_type not in _FAMILY or not config.is_encoder_decoder:
            raise ModelLoadError(
                f"{self.model!r} is no T5 or mT5 but {config.model_type!r}: monoT5's answer is the first step of their "
                "decoder. Use cross-encoder: for a sequence-classification model, bge: for BGE's LLM rerankers"
            )
        architectures = list(config.architectures or [])
        if architectures and not any(name.endswith(_WHOLE_MODELS) for name in architectures):
            raise ModelLoadError(
                f"{self.model!r} is {', '.join(architectures)}, which gives no answer in words; monoT5 is a "
                "T5ForConditionalGeneration"
            )

    def _backend_tokenizer(self, tokenizer: Any) -> tokenizers.Tokenizer:
        backend: tokenizers.Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ModelLoadError(f"{self.model!r} has no fast tokenizer (tokenizer.json); convert it with transformers")
        backend.no_truncation()
        backend.no_padding()
        if backend.encode("x").ids[-1:] != [tokenizer.eos_token_id]:
            raise ModelLoadError(f"{self.model!r} has a tokenizer that does not end its texts with </s>, as T5's does")
        self._pad = tokenizer.pad_token_id or 0
        return backend

    def _id_of(self, piece: str, tokenizer: Any) -> int:
        """The id of an answer's vocabulary piece."""
        # Not convert_tokens_to_ids, which takes any piece and answers with the unknown one's id.
        found: int | None = self._tokenizer.token_to_id(piece)
        if found is None or found == tokenizer.unk_token_id:
            near = f"; did you mean '▁{piece}'?" if self._tokenizer.token_to_id(f"▁{piece}") is not None else ""
            raise ModelLoadError(f"{self.model!r} has no vocabulary piece {piece!r} to answer with{near}")
        return found

    def _without_head(self, model: Any, answers: Sequence[int]) -> Any:
        """Keep the answers' two rows of the output head, in float32, and drop the others.

        What the model then calls logits are its decoder's states, scaled as that model scales them.
        """
        import torch

        rows = model.lm_head.weight[list(answers)].detach()
        self._head = rows.to(self._device, torch.float32)
        model.lm_head = torch.nn.Identity()
        return model

    def _pad_id(self) -> int:
        return self._pad

    def _encode(self, query: str, texts: Sequence[str]) -> list[Encoding]:
        before, between, after = self._wording.parts()
        lead = before + self._shorten(query) + between
        prompts = self._tokenizer.encode_batch([lead + text + after for text in texts])
        return [
            self._fit(prompt, len(lead), len(lead) + len(text)) for prompt, text in zip(prompts, texts, strict=True)
        ]

    def _shorten(self, query: str) -> str:
        """The query, or as much of it as it may have."""
        asked = self._tokenizer.encode(query, add_special_tokens=False)
        kept = len(self._cut_query(asked.ids))
        return query if kept == len(asked.ids) else query[: asked.offsets[kept][0]]

    def _fit(self, prompt: tokenizers.Encoding, start: int, end: int) -> Encoding:
        """A whole prompt's ids, without those at the end of its text (characters start to end) that do not fit.

        Tokenised as one string, since a piece may span the seam of two parts.
        """
        ids = prompt.ids
        first, last = _span(prompt.offsets, start, end)
        room = max(1, self._limit - len(ids) + last - first)
        if last - first <= room:
            return Encoding(ids, room=room)
        # A passage from the middle of a word begins with a ▁ that was not there before.
        return Encoding([*ids[: first + room], *ids[last:]], truncated=True, room=max(1, room - 1))

    def _offsets(self, text: str) -> Sequence[tuple[int, int]]:
        offsets: list[tuple[int, int]] = self._tokenizer.encode(text, add_special_tokens=False).offsets
        return offsets

    def _forward(self, batch: Batch) -> Logits:
        """One padded batch of b prompts, shape (b, t) token ids, to b differences of the "true" and "false" logits."""
        import torch

        with torch.inference_mode():
            states = self._model(
                input_ids=torch.from_numpy(batch.ids).to(self._device),
                attention_mask=torch.from_numpy(batch.mask).to(self._device),
                decoder_input_ids=torch.full((len(batch), 1), self._start, device=self._device),
                use_cache=False,
            ).logits
            false, true = self._head @ states[:, 0].float().T
            logits: Logits = (true - false).cpu().numpy()
        return logits


def _span(offsets: Sequence[tuple[int, int]], start: int, end: int) -> tuple[int, int]:
    """Which tokens a text was cut into: the index of the first, and of the first after them.

    Args:
        offsets: The character span of each token, in order; (0, 0) of specials at the end.
        start: The text's first character.
        end: The character after its last.
    """
    last = len(offsets)
    while last and (offsets[last - 1] == (0, 0) or offsets[last - 1][0] >= end):
        last -= 1
    return next((index for index in range(last) if offsets[index][1] > start), last), last
