"""Turns conversations into rows of tokens, of which the assistant's turns are learned."""

from collections import Counter
from collections.abc import Sequence
from itertools import chain

import numpy as np

from unmask import paths
from unmask.data.chat_template import PLAIN, PLAIN_SOURCE, ChatTemplate
from unmask.data.conversations import ConversationEncoder, EncodedConversation, FieldNames, read_conversation
from unmask.data.prepare.documents import find_special_token
from unmask.data.prepare.round_trip import check_round_trip, choose_rows
from unmask.data.prepare.settings import PrepareSettings
from unmask.data.prepare.sources import Row
from unmask.data.prepare.writing import Report, Shard
from unmask.data.tokenizer_files import find_chat_template, find_named_tokens, find_tokenizer
from unmask.data.vocabulary import BYTES, Vocabulary
from unmask.errors import UserError
from unmask.formats import read_text


def find_template(settings: PrepareSettings, vocabulary: Vocabulary) -> ChatTemplate:
    """Finds the template that `settings.template` names; default: the tokenizer's own, or `plain` if it has none.

    Raises:
        UserError: there is none of that name, or it is no template.
    """
    if isinstance(settings.template, ChatTemplate):
        return settings.template
    given = settings.template
    path = None if settings.tokenizer == BYTES else find_tokenizer(settings.tokenizer)
    tokens = {} if path is None else find_named_tokens(path)
    tokens |= {"eos_token": vocabulary.name(vocabulary.eos_id)}
    own = find_chat_template(path) if path is not None and given is None else None
    where, source = f"--tokenizer {settings.tokenizer}", own or PLAIN_SOURCE
    if given not in (None, PLAIN):
        where, source = f"--template {given}", read_text(paths.existing_file(given, "--template "))
    try:
        return ChatTemplate(source, tokens, settings.template_options, "last" if settings.turns == "last" else "all")
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def make_shard(rows: Sequence[Row], vocabulary: Vocabulary, settings: PrepareSettings, before: int = 0) -> Shard:
    """Encodes `rows`, which follow `before` others; `vocabulary` is that of all ids.

    A row is the conversation up to the end of its last learned turn. Its padding begins with an end token, unless that
    turn ends with one.
    """
    encoder = ConversationEncoder(vocabulary, find_template(settings, vocabulary))
    names = FieldNames(settings.messages_field, settings.prompt_field, settings.answer_field)
    problems: dict[int, str] = {}
    fates: Counter[str] = Counter()
    kept: list[EncodedConversation] = []
    checked: list[str] = []
    chosen = choose_rows(len(rows), before, settings)
    for i, row in enumerate(rows):
        try:
            messages = read_conversation(row.fields, names)
            encoded = encoder.encode(messages)
            found = _cut(encoded, vocabulary, settings)
        except ValueError as problem:
            problems[i] = str(problem)
            continue
        checked += [messages[-1]["content"]] if i in chosen else []
        fates[found[1]] += 1
        kept += [found[0]] if found[0] is not None else []
    sample = [*zip(checked, vocabulary.encode_batch(checked), strict=True)]
    check_round_trip(sample, vocabulary, settings.tokenizer, is_exact=False)
    return _join(kept, Report.of(rows, fates, problems, len(kept)))


def _cut(
    encoded: EncodedConversation, vocabulary: Vocabulary, settings: PrepareSettings
) -> tuple[EncodedConversation | None, str]:
    """Cuts a conversation to the length of a row; returns it, None where nothing is left, and its fate.

    Raises:
        ValueError: it holds the mask, or nothing that the tokenizer knows is to be learned.
    """
    ids, turns, length = encoded.ids, encoded.turns, settings.length
    if not turns:
        raise ValueError("the tokenizer knows nothing of what the assistant says")
    if vocabulary.mask_id in ids:
        raise ValueError(f"{find_special_token(ids, vocabulary)}")
    whole = [turn for turn in turns if turn[1] + (ids[turn[1] - 1] != vocabulary.eos_id) <= length]
    if whole == turns:
        return encoded, "kept"
    cut = turns[len(whole)]  # the first one that does not fit
    if settings.too_long == "truncate" and cut[0] < length:
        return EncodedConversation(ids[:length], [*whole, (cut[0], min(cut[1], length))]), "truncated"
    if settings.too_long != "drop" and whole:
        return EncodedConversation(ids[: whole[-1][1]], whole), "shortened"
    return None, "dropped_no_room" if turns[0][0] >= length else "dropped_too_long"


def _join(kept: Sequence[EncodedConversation], report: Report) -> Shard:
    num_tokens = np.array([len(own.ids) for own in kept], np.int64)
    is_given = np.ones(int(num_tokens.sum()), np.bool_)
    for first, own in zip(np.cumsum(num_tokens) - num_tokens, kept, strict=True):
        for start, end in own.turns:
            is_given[first + start : first + end] = False
    return Shard(
        np.fromiter(chain.from_iterable(own.ids for own in kept), np.uint32, len(is_given)),
        num_tokens,
        np.array([own.turns[0][0] for own in kept], np.int64),
        report,
        is_given=is_given,
    )
