"""Results: rows and their files, tables of them, and the directory of a run.

Metrics come in as rows of plain numbers. What goes out are logs that survive a kill, their export
`results.csv`, the tables of a study, and `load_run` for analysis; figures come next. Rows are read
without jax.
"""

from jaxprune.results.rows import Row as Row
from jaxprune.results.rows import append_rows as append_rows
from jaxprune.results.rows import cut_log as cut_log
from jaxprune.results.rows import first_digest as first_digest
from jaxprune.results.rows import read_csv as read_csv
from jaxprune.results.rows import read_log as read_log
from jaxprune.results.rows import write_csv as write_csv
from jaxprune.results.runs import FORMAT as FORMAT
from jaxprune.results.runs import Run as Run
from jaxprune.results.runs import arm_of as arm_of
from jaxprune.results.runs import compare_settings as compare_settings
from jaxprune.results.runs import in_order as in_order
from jaxprune.results.runs import load_run as load_run
from jaxprune.results.runs import plain as plain
from jaxprune.results.runs import read_config as read_config
from jaxprune.results.runs import read_json as read_json
from jaxprune.results.runs import rows_path as rows_path
from jaxprune.results.runs import stage_name as stage_name
from jaxprune.results.runs import write_json as write_json
from jaxprune.results.tables import Table as Table
from jaxprune.results.tables import cell as cell
from jaxprune.results.tables import decimals as decimals
from jaxprune.results.tables import difference as difference
from jaxprune.results.tables import drawn_metrics as drawn_metrics
from jaxprune.results.tables import last_epoch as last_epoch
from jaxprune.results.tables import mean_interval as mean_interval
from jaxprune.results.tables import of_difference as of_difference
from jaxprune.results.tables import paired as paired
from jaxprune.results.tables import spread as spread
from jaxprune.results.tables import tables as tables
from jaxprune.results.tables import text as text
