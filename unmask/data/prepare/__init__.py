"""From text, question and answer or running on, to a store of rows of token ids (`data/store.py`).

`sources.py`, `corpora.py` and `hub.py` read rows, `rows.py` tokenises a batch of questions and answers, `documents.py`
one of running text, `pool.py` has that done in several processes, `work.py` keeps what is done of an unfinished
preparation, `finish.py` puts it together (`packing.py` running text), and `run.py` calls them all.
"""

from unmask.data.prepare.run import prepare as prepare
from unmask.data.prepare.settings import Settings as Settings
