"""From question and answer, as text, to a store of rows of token ids (`data/store.py`).

`sources.py` and `hub.py` read rows, `rows.py` tokenises a batch of them, `pool.py` has that done in several processes,
`work.py` keeps what is done of an unfinished preparation, `finish.py` puts it together, and `run.py` calls them all.
"""

from unmask.data.prepare.run import prepare as prepare
from unmask.data.prepare.settings import Settings as Settings
