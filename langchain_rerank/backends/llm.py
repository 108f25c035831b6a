"""Language models as rerankers, such as bge-reranker-v2-gemma."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import PrivateAttr

from langchain_rerank.backends._prompt import PromptBackend
from langchain_rerank.backends.local import Batch, Logits
from langchain_rerank.errors import ModelLoadError

_HEAD_OPTIONS = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""What some models do to their logits after the head's product, under its name in config.json."""


class LLMBackend(PromptBackend):
    """Asks a decoder whether the passage answers the query; the score is the sigmoid of the logit of "Yes".

    "Yes" alone, at the last token of the prompt: no "No", no softmax. Logits are those of FlagEmbedding's
    `FlagLLMReranker`. https://huggingface.co/BAAI/bge-reranker-v2-gemma
    """

    requires: ClassVar[tuple[str, ...]] = ("torch", "transformers")
    extra: ClassVar[str] = "bge"

    model: str = "BAAI/bge-reranker-v2-gemma"

    _yes: Any = PrivateAttr(default=None)
    """The head's row for "Yes", shape (hidden,), in float32."""

    def _load(self) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        self._pick_device()
        with self._loading():
            config = AutoConfig.from_pretrained(self.model, **self._source())
            self._check(config)
            tokenizer = AutoTokenizer.from_pretrained(self.model, **self._source())
            model = self._pretrained(AutoModelForCausalLM, config)
        begin = None if tokenizer.bos_token_id == tokenizer.pad_token_id else tokenizer.bos_token_id
        self._set_tokenizer(tokenizer, begin=begin, positions=getattr(config, "max_position_embeddings", None))
        self._model = model.eval().to(self._device)
        self._yes = self._model.get_output_embeddings().weight[self._id_of_yes(tokenizer)].detach().float()

    def _check(self, config: Any) -> None:
        architectures = list(getattr(config, "architectures", None) or [])
        if not any(name.endswith("ForCausalLM") for name in architectures):
            raise ModelLoadError(
                f"{self.model!r} is no language model but {', '.join(architectures) or 'of no named architecture'}: "
                "it has no logit for 'Yes'. For a sequence-classification model use cross-encoder:"
            )
        changed = [name for name in _HEAD_OPTIONS if getattr(config, name, None) not in (None, 1.0)]
        if changed:
            raise ModelLoadError(
                f"{self.model!r} changes its logits by {changed[0]}, which the 'Yes' logit here would lack; "
                "use a reranker built on a model such as Gemma, Llama, Mistral or Qwen"
            )

    def _id_of_yes(self, tokenizer: Any) -> int:
        ids = self._ids("Yes")
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            pieces = tokenizer.convert_ids_to_tokens(ids)
            raise ModelLoadError(
                f"{self.model!r}: its tokenizer has no piece 'Yes' but makes {pieces} of it, and the score is the "
                "logit of that one token. Use a model whose vocabulary has it"
            )
        return ids[0]

    def _forward(self, batch: Batch) -> Logits:
        """One batch of b prompts, shape (b, t) token ids padded on either side, to b logits."""
        import torch

        with torch.inference_mode():
            ids = torch.from_numpy(batch.ids).to(self._device)
            mask = torch.from_numpy(batch.mask).to(self._device)
            states = self._model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            # The last position that is a token: on the right of it there may be padding, whose logit says nothing.
            last = (mask * torch.arange(mask.shape[1], device=self._device)).argmax(dim=1)
            chosen = states[torch.arange(len(batch), device=self._device), last]
            # One row of the head: the whole vocabulary's logits for each token would take gigabytes.
            logits: Logits = (chosen.float() @ self._yes).cpu().numpy()
        return logits
