"""lm-evaluation-harness for GLM: its model `chatglm`.

A context becomes a prompt, which [gMASK] and <sop> end; what is scored or generated is the answer behind them, encoded
as the model was trained, on its own. So a blank between context and continuation is nobody's: an answer's first word
begins with the "▁" that SentencePiece puts there.

`loglikelihood_rolling` is the text as an answer to nothing; the parts of a text that is longer than the model's
`max_sequence_length` are answers to the last token before them.
"""

from __future__ import annotations

import torch
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from package import package_module

process_response = package_module("chat").process_response
END = "<eop>"  # which the tokenizer prints as nothing, and the harness wants to see


@register_model("chatglm")
class ChatGLM(HFLM):
    """`HFLM` with GLM's sequences; takes the same arguments."""

    def __init__(self, pretrained, **options) -> None:
        if isinstance(pretrained, str):
            options.setdefault("trust_remote_code", True)
        super().__init__(pretrained=pretrained, backend="causal", **options)

    @property
    def max_length(self) -> int:
        return self._max_length or self.config.max_sequence_length

    @property
    def prefix_token_id(self) -> int:
        """What the harness puts where there is no context; `prompt` takes it away again."""
        return self.tokenizer.gmask_token_id

    def prompt(self, context: list[int], most: int) -> list[int]:
        """The last tokens of a context, with [gMASK] and <sop> at most `most`."""
        end = [self.tokenizer.gmask_token_id, self.tokenizer.bos_token_id]
        text = [token for token in context if token not in end]
        return text[max(len(text) + len(end) - most, 0) :] + end

    def tok_encode(self, string: str, add_special_tokens=None, left_truncate_len=None, **_) -> list[int]:
        ids = self.tokenizer.encode_text(string)
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def tok_batch_encode(self, strings, padding_side="left", left_truncate_len=None, truncation=False):
        """Prompts [B, S], padded on the left, and their masks."""
        most = left_truncate_len or self.max_length
        prompts = {"input_ids": [self.prompt(self.tok_encode(string), most) for string in strings]}
        batch = self.tokenizer.pad(prompts, return_tensors="pt")
        return batch["input_ids"], batch["attention_mask"]

    def tok_decode(self, tokens, skip_special_tokens: bool = True) -> str:
        """As chat shows it: with full-width punctuation beside Chinese characters."""
        if tokens == self.eot_token_id and not skip_special_tokens:
            return END
        return process_response(super().tok_decode(tokens, skip_special_tokens=skip_special_tokens))

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        stripped = context.rstrip(" ")
        continuation = (context[len(stripped) :] + continuation).removeprefix(" ")
        return self.tok_encode(stripped), self.tok_encode(continuation)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, override_bs: int | None = None):
        pairs = []
        for texts, context, answer in requests:
            if len(answer) > self.max_length - 2:
                raise ValueError(
                    f"a continuation of {len(answer)} tokens: with [gMASK] and <sop> the model takes {self.max_length}"
                )
            pairs.append((texts, self.prompt(context, self.max_length + 1 - len(answer)), answer))
        return super()._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm, override_bs=override_bs)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows, texts = [], []
        for index, request in enumerate(requests):
            ids, room = self.tok_encode(request.args[0]), self.max_length - 3
            parts = utils.get_rolling_token_windows(ids, self.prefix_token_id, max_seq_len=room, context_len=1)
            windows += [(None, *utils.make_disjoint_window(part)) for part in parts]
            texts += [index] * (len(windows) - len(texts))
        found = torch.zeros(len(requests), dtype=torch.float64)
        for index, (logprob, _) in zip(texts, self._loglikelihood_tokens(windows, disable_tqdm)):
            found[index] += logprob
        for request, logprob in zip(requests, found.tolist()):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, logprob)
        return found.tolist()
