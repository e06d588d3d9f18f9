"""Prepares text as a store of rows of token ids (`data/store.py`): questions and answers, conversations, running text.

`sources.py`, `documents.py` and `hub.py` read rows; `rows.py` tokenises a batch of questions and answers,
`conversations.py` one of conversations, `documents.py` one of running text; `workers.py` does that in several
processes, and keeps unfinished work; `writing.py` joins the shards into a store (`rows.py` packs running text);
`run.py` calls them all.
"""

from unmask.data.prepare.run import prepare as prepare
from unmask.data.prepare.settings import PrepareSettings as PrepareSettings
