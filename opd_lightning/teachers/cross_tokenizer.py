"""Frozen local teacher with a tokenizer that differs from the student's."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from opd_lightning.errors import UserError
from opd_lightning.losses.alignment import Pairs
from opd_lightning.models.causal_lm import Dtype
from opd_lightning.models.chat import render
from opd_lightning.models.head import MixedStates, TokenStates
from opd_lightning.models.padding import make_view, pad
from opd_lightning.models.source import ModelSource
from opd_lightning.models.tokenization import (
    align,
    paired_tokens,
    token_bytes,
    whole_characters,
)
from opd_lightning.teachers.base import Groups, GroupTeacher
from opd_lightning.teachers.frozen import FrozenTeacher
from opd_lightning.teachers.longer_tokens import LongerTokens, Span, score_with_surplus
from opd_lightning.types import Prompt, Rollout, RolloutBatch, TokenScores

if TYPE_CHECKING:
    from opd_lightning.models.student import Student

log = logging.getLogger(__name__)
_END = b"\xff"  # stands for both ends of sequence: a byte that no UTF-8 text has


class _Translated(NamedTuple):
    """A rollout in the teacher's tokens."""

    prompt_ids: list[int]
    response_ids: list[int]
    columns: list[int]  # per response token, the student's token that ends its group
    spans: list[list[Span]]  # per response token, the spans that start there


class _Read(NamedTuple):
    """A micro-batch as the teacher read it. N_T are its response tokens without padding."""

    batch: RolloutBatch  # in the teacher's tokens
    columns: Tensor  # [B, R_T] int64, of the student's token that ends the group
    states: TokenStates  # N_T
    logprobs: Tensor  # [N_T] nats
    surplus: Tensor  # [N_T] of longer tokens, see `longer_tokens`


class CrossTokenizerTeacher(GroupTeacher):
    """Frozen Hugging Face causal LM that scores the text of a response with its own tokenizer.

    The messages are rendered with the teacher's chat template and the response is encoded with its
    tokenizer; its end of sequence follows if the response has one. Tokens are compared in groups:
    the shortest runs on both sides that end at the same byte. A group is one action. Its score is
    the teacher's log-prob of the group's text, without what its tokens imply about the following
    text (see `longer_tokens` for the derivation). `losses.alignment.in_groups` assigns the group's
    difference to each of its student tokens. With the student's tokenizer it is `FrozenTeacher`.

    `GOLD` compares its whole distributions at the ends of groups; other methods read its scores of
    the sampled tokens.

    Limits. The plain prompt alone is read. Of all encodings of a text only
    the tokenizer's is scored, so the log-prob is at most the text's; and the student may have
    sampled another encoding than its tokenizer's. A student token also excludes longer student
    tokens, which a teacher with shorter tokens decides only later. The sum over a response is
    correct, but part of it is assigned one group too early. With `discount` 0 this is a bias. (A
    student of single characters has none.) A temperature other than 1 divides
    the logits of each model's tokens, so equal distributions of text become unequal. A special
    token within the response is encoded as its name, which is a special token again if the teacher
    has one of that name. A character that the length limit cut off is not scored, nor is
    what exceeds the teacher's context, of which the first response is named in a warning. Other
    bytes that are not UTF-8 are read as U+FFFD.

    Args:
        path: Model folder or hub name.
        dtype: Dtype of weights and arithmetic; log-softmaxes are always float32.
        template_args: Extra variables for the teacher's chat template.
        attn_implementation: transformers' attention kernel; None takes its default.
        trust_remote_code: Run code that ships with the model.
        chat_template: Jinja text or file, used instead of the folder's.
        eos_tokens: Tokens that end a response, instead of the folder's; the first stands for the
            end of a response of the student.
    """

    provides_entropy = False
    _student: ModelSource
    _token_bytes: tuple[dict[int, bytes], dict[int, bytes]]  # bytes by token: student's, teacher's
    _longer_tokens: LongerTokens

    def __init__(
        self,
        path: str,
        dtype: Dtype = "float32",
        template_args: dict[str, Any] | None = None,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        chat_template: str | None = None,
        eos_tokens: list[str] | None = None,
    ) -> None:
        self.frozen = FrozenTeacher(
            path,
            dtype,
            attn_implementation,
            trust_remote_code,
            chat_template=chat_template,
            eos_tokens=eos_tokens,
        )
        self.source: ModelSource = self.frozen.source
        self.template_args = template_args or {}
        self._prompts: dict[str, list[int]] = {}
        self._has_warned = False
        self._pairs: Pairs | None = None  # known after the first call of `groups`

    def check_model(self, student: Student) -> None:
        self.frozen.check_model(student)

    def check_prompt(self, prompt: Prompt) -> None:
        length, limit = len(self._prompt_ids(prompt)), self.source.context_length
        if length >= limit:
            raise UserError(
                f"{prompt.origin or prompt.id}: its {length} of the teacher's tokens leave no room "
                f"for a response in the teacher's context of {limit}; shorten the row"
            )

    def load(self, device: torch.device, student: Student) -> None:
        self.frozen.load(device, student)
        self._student = student.source
        self._token_bytes = token_bytes(student.source), token_bytes(self.source)
        added = self.source.tokenizer.added_tokens_decoder
        special = {i for i, token in added.items() if token.special}  # do not continue a text
        text = {i: word for i, word in self._token_bytes[1].items() if i not in special}
        self._longer_tokens = LongerTokens(text, student.source)

    @property
    def is_collective(self) -> bool:
        return self.frozen.is_collective

    def release(self) -> None:
        self.frozen.release()

    def score(self, batch: RolloutBatch, view: str, *, top_k: int = 0) -> TokenScores:
        return self._scores(batch, self._read(batch, view))

    def groups(self, batch: RolloutBatch, view: str) -> Groups:
        read = self._read(batch, view)
        mask = read.batch.response_mask
        number = batch.response_mask.flatten().cumsum(0).view(batch.response_mask.shape) - 1
        # The student's token that ends the group; rows that are left out of training have none.
        end = number.gather(1, read.columns)[mask]
        is_read = batch.response_mask.gather(1, read.columns)[mask]
        is_last = end != torch.cat([end[1:], end.new_full((1,), -1)])
        before, last = is_read & ~is_last, is_read & is_last
        given = read.logprobs.new_zeros(int(batch.response_mask.sum()))
        states = TokenStates(read.states.hidden[last], read.states.head)
        return Groups(
            scores=self._scores(batch, read),
            states=MixedStates(((end[last], states),)),
            given=given.index_add(0, end[before], read.logprobs[before]),
            pairs=self._paired(read.states.head.vocab_size, mask.device),
        )

    @property
    def shared_vocabulary(self) -> float:
        """Share of the teacher's tokens that stand for the same text as one of the student's.

        Known after the first call of `groups`.
        """
        assert self._pairs is not None
        return self._pairs.share

    def _paired(self, size: int, device: torch.device) -> Pairs:
        if self._pairs is None:
            ours, theirs = map(torch.tensor, paired_tokens(self._student, self.source))
            sizes = self._student.config.get_text_config().vocab_size, size
            known = len(self.source.tokenizer.get_vocab())
            self._pairs = Pairs.of(ours, theirs, sizes, known).to(device)
        return self._pairs

    def _read(self, batch: RolloutBatch, view: str) -> _Read:
        rows = [self._translate(rollout) for rollout in batch.rollouts]
        prompts, responses = [row.prompt_ids for row in rows], [row.response_ids for row in rows]
        device, pad_id = batch.response_ids.device, self.source.pad_id
        ids, mask = (x.to(device) for x in pad(responses, pad_id))
        columns = pad([row.columns for row in rows], 0)[0].to(device)
        seen = make_view(prompts, responses, pad_id).to(device)
        translated = replace(batch, views={view: seen}, response_ids=ids, response_mask=mask)
        states = self.frozen.states(translated, view)
        spans = [spans for row in rows for spans in row.spans]
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            own, surplus = score_with_surplus(states, ids[mask], spans)
        return _Read(translated, columns, states, own, surplus)

    def _scores(self, batch: RolloutBatch, read: _Read) -> TokenScores:
        mask, unflatten = read.batch.response_mask, read.batch.unflatten
        theirs = unflatten(read.logprobs + read.surplus)
        theirs[:, 1:] -= unflatten(read.surplus)[:, :-1]
        theirs = torch.where(mask, theirs, 0.0).float()
        sums = theirs.new_zeros(batch.response_ids.shape).scatter_add_(1, read.columns, theirs)
        counts = torch.zeros_like(batch.response_ids).scatter_add_(1, read.columns, mask.long())
        return TokenScores(
            logprobs=torch.where(batch.response_mask, sums, 0.0),
            entropy=torch.full_like(sums, torch.nan),
            top_ids=batch.response_ids.new_zeros(*sums.shape, 0),
            top_logprobs=sums.new_zeros(*sums.shape, 0),
            ends=batch.response_mask & (counts > 0),
            group_tokens=counts,
        )

    def _translate(self, rollout: Rollout) -> _Translated:
        ended = not rollout.stop_reason.is_truncated()
        ids = rollout.response_ids[: -1 if ended else None]
        our_bytes, their_bytes = self._token_bytes
        # A head may be larger than its vocabulary; the additional tokens have no text.
        ours = [our_bytes.get(i, b"") for i in ids]
        if not ended:
            ours = ours[: whole_characters(ours)]
        text = self._student.tokenizer.decode(ids[: len(ours)], clean_up_tokenization_spaces=False)
        response_ids = self.source.tokenizer.encode(text, add_special_tokens=False)
        theirs = [their_bytes[i] for i in response_ids]
        if ended:
            response_ids.append(self.source.tokenizer.eos_token_id)
            ours, theirs = [*ours, _END], [*theirs, _END]
        prompt_ids = self._prompt_ids(rollout.prompt)
        room = self.source.context_length - len(prompt_ids)
        groups = [group for group in align(ours, theirs) if group.teacher[-1] < room]
        if len(response_ids) > room and not self._has_warned:
            self._has_warned = True
            log.warning(
                "a response to prompt %s has %d of the teacher's tokens, the first %d of which fit "
                "in its context and are scored; lower sampling.max_new_tokens",
                rollout.prompt.id,
                len(response_ids),
                room,
            )
        columns = [group.student[-1] for group in groups for _ in group.teacher]
        ends = {group.teacher[-1] for group in groups}
        spans = self._longer_tokens.spans(theirs[: len(columns)], ends)
        return _Translated(prompt_ids, response_ids[: len(columns)], columns, spans)

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        if prompt.id not in self._prompts:
            ids = render(prompt, self.source.tokenizer, self.template_args, role="teacher")
            self._prompts[prompt.id] = ids
        return self._prompts[prompt.id]
