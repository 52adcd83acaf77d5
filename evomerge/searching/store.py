"""run.db: the single source of truth of a run. Only the driver opens it; every event is one transaction."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.engines import LayerEvaluations
from evomerge.errors import InfrastructureError, UserError
from evomerge.evaluation.items import Block, Item, ItemScore
from evomerge.recipe import Recipe
from evomerge.spaces.genotype import Genotype
from evomerge.workers.work import Outcome

SCHEMA_VERSION = 3

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE items (id TEXT PRIMARY KEY, task TEXT NOT NULL, split TEXT NOT NULL, position INTEGER NOT NULL)
  WITHOUT ROWID;
CREATE TABLE blocks (hash TEXT PRIMARY KEY, split TEXT NOT NULL, position INTEGER NOT NULL,
  parts TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE recipes (hash TEXT PRIMARY KEY, body TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE generations (generation INTEGER PRIMARY KEY, blocks TEXT NOT NULL,
  told INTEGER NOT NULL DEFAULT 0);
CREATE TABLE candidates (id INTEGER PRIMARY KEY, generation INTEGER NOT NULL, position INTEGER NOT NULL,
  genotype TEXT NOT NULL, recipe TEXT NOT NULL REFERENCES recipes(hash),
  status TEXT NOT NULL DEFAULT 'asked', fitness REAL, rank REAL, reason TEXT,
  UNIQUE (generation, position));
CREATE TABLE results (recipe TEXT NOT NULL, block TEXT NOT NULL, failure TEXT, worker TEXT NOT NULL,
  cached INTEGER NOT NULL, merge_seconds REAL NOT NULL, score_seconds REAL NOT NULL, recorded REAL NOT NULL,
  PRIMARY KEY (recipe, block)) WITHOUT ROWID;
CREATE TABLE scores (recipe TEXT NOT NULL, block TEXT NOT NULL, item TEXT NOT NULL, task TEXT NOT NULL,
  raw REAL NOT NULL, value REAL NOT NULL, truncated INTEGER, PRIMARY KEY (recipe, block, item)) WITHOUT ROWID;
CREATE TABLE short_list (round INTEGER NOT NULL, position INTEGER NOT NULL, name TEXT NOT NULL,
  recipe TEXT NOT NULL REFERENCES recipes(hash), candidate INTEGER, PRIMARY KEY (round, position))
  WITHOUT ROWID;
CREATE TABLE winners (round INTEGER PRIMARY KEY, recipe TEXT NOT NULL REFERENCES recipes(hash),
  name TEXT NOT NULL);
CREATE TABLE test_openings (round INTEGER PRIMARY KEY, reason TEXT NOT NULL, opened REAL NOT NULL);
CREATE TABLE attempts (id INTEGER PRIMARY KEY, work TEXT NOT NULL, worker TEXT NOT NULL,
  reason TEXT NOT NULL, recorded REAL NOT NULL);
CREATE TABLE events (id INTEGER PRIMARY KEY, recorded REAL NOT NULL, kind TEXT NOT NULL,
  data TEXT NOT NULL);
"""

CANONICAL = {
    "items": "id, task, split, position",
    "blocks": "hash, split, position, parts",
    "recipes": "hash, body",
    "generations": "generation, blocks, told",
    "candidates": "generation, position, genotype, recipe, status, fitness, rank, reason",
    "results": "recipe, block, failure",
    "scores": "recipe, block, item, task, raw, value, truncated",
    "short_list": "round, position, name, recipe, candidate",
    "winners": "round, recipe, name",
    "test_openings": "round, reason",
}
"""The tables and columns that an interrupted and resumed run shares with an undisturbed one."""

_SHARED_FILE_SYSTEMS = ("nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "9p", "fuse")


@dataclass(frozen=True)
class CandidateRow:
    """One candidate as recorded.

    Attributes:
        id: number in the run, from 0.
        status: ``asked``, ``scored``, ``screened`` (it did not come through the screen) or ``failed``.
        fitness: weighted mean over tasks on the generation's blocks; None unless scored.
        rank: 0 is the generation's best; None before the generation is told.
        reason: why it failed.
    """

    id: int
    generation: int
    position: int
    genotype: Genotype
    recipe: str
    status: str
    fitness: float | None
    rank: float | None
    reason: str | None


class Store:
    """The run's database, open for writing under an exclusive lock.

    Args:
        path: the ``run.db`` file.
        create: make it; otherwise it must exist.

    Raises:
        UserError: another driver holds it, it is missing, or another version made it.
    """

    def __init__(self, path: Path, *, create: bool) -> None:
        if create == path.exists():
            raise UserError(f"{path}: {'exists already' if create else 'no such run database'}")
        self.path = path
        try:
            self._db = sqlite3.connect(path, timeout=0.5, isolation_level=None)
        except sqlite3.Error as error:
            raise InfrastructureError(f"{path}: cannot be opened: {error}") from None
        try:
            self._lock()
            if create:
                with self.transaction():
                    for statement in _SCHEMA.split(";"):
                        self._db.execute(statement)
                    self._set_meta("schema_version", SCHEMA_VERSION)
            else:
                self._check_version()
        except BaseException:
            self._db.close()
            raise

    def _lock(self) -> None:
        mode = "DELETE" if _on_shared_file_system(self.path) else "WAL"
        try:
            self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._db.execute(f"PRAGMA journal_mode={mode}")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("PRAGMA foreign_keys=ON")
            self._db.execute("BEGIN EXCLUSIVE")
            self._db.execute("COMMIT")
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise UserError(
                    f"{self.path}: another evomerge process is driving this run; wait until it ends, or stop it"
                ) from None
            raise InfrastructureError(f"{self.path}: cannot be opened: {error}") from None
        except sqlite3.DatabaseError as error:
            raise UserError(f"{self.path}: not a run database: {error}") from None

    def close(self) -> None:
        """Close the database; the write-ahead log is merged into it."""
        self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Make the enclosed writes one event: all or nothing, on disk when it returns."""
        nested = self._db.in_transaction
        if nested:
            yield
            return
        try:
            self._db.execute("BEGIN IMMEDIATE")
            yield
            self._db.execute("COMMIT")
        except BaseException as error:
            # A full disk makes SQLite roll back by itself.
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            if type(error) in (sqlite3.OperationalError, sqlite3.DatabaseError):
                raise InfrastructureError(f"{self.path}: cannot be written: {error}") from None
            raise

    def meta(self, key: str, default: Any = None) -> Any:
        """Return a recorded fact of the run."""
        row = self._db.execute("SELECT value FROM meta WHERE key=?", (key,)).fetchone()
        return default if row is None else json.loads(row[0])

    def set_meta(self, **facts: Any) -> None:
        """Record facts of the run."""
        with self.transaction():
            for key, value in facts.items():
                self._set_meta(key, value)

    def event(self, kind: str, **data: Any) -> None:
        """Append to the run's log."""
        with self.transaction():
            self._db.execute(
                "INSERT INTO events (recorded, kind, data) VALUES (?,?,?)",
                (time.time(), kind, json.dumps(data)),
            )

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield the run's log from the start."""
        for recorded, kind, data in self._db.execute("SELECT recorded, kind, data FROM events ORDER BY id"):
            yield {"time": recorded, "event": kind, **json.loads(data)}

    def add_items(self, items: Sequence[Item], blocks: Sequence[Block]) -> None:
        """Record the items and the blocks they were cut into."""
        with self.transaction():
            self._db.executemany(
                "INSERT INTO items VALUES (?,?,?,?)", [(i.id, i.task, i.split, i.index) for i in items]
            )
            self._db.executemany(
                "INSERT INTO blocks VALUES (?,?,?,?)",
                [
                    (b.hash, b.split, b.index, json.dumps([[p.task, p.packing, p.items] for p in b.parts]))
                    for b in blocks
                ],
            )

    def block_hashes(self) -> set[str]:
        """Return the hashes of all recorded blocks."""
        return {row[0] for row in self._db.execute("SELECT hash FROM blocks")}

    def add_recipe(self, recipe: Recipe) -> None:
        """Record a recipe's body under its hash."""
        with self.transaction():
            self._db.execute(
                "INSERT OR IGNORE INTO recipes VALUES (?,?)", (recipe.hash, json.dumps(recipe.to_dict()))
            )

    def recipe(self, digest: str) -> Recipe:
        """Return a recorded recipe."""
        row = self._db.execute("SELECT body FROM recipes WHERE hash=?", (digest,)).fetchone()
        if row is None:
            raise KeyError(digest)
        return Recipe.from_dict(json.loads(row[0]), self.path)

    def add_generation(
        self, generation: int, blocks: Sequence[Block], asked: Sequence[tuple[Genotype, Recipe]]
    ) -> None:
        """Record a generation as asked."""
        with self.transaction():
            self._db.execute(
                "INSERT INTO generations (generation, blocks) VALUES (?,?)",
                (generation, json.dumps([block.hash for block in blocks])),
            )
            first = self._db.execute("SELECT COUNT(*) FROM candidates").fetchone()[0]
            for position, (genotype, recipe) in enumerate(asked):
                self.add_recipe(recipe)
                self._db.execute(
                    "INSERT INTO candidates (id, generation, position, genotype, recipe) VALUES (?,?,?,?,?)",
                    (first + position, generation, position, json.dumps(genotype), recipe.hash),
                )

    def generation_blocks(self, generation: int) -> list[str] | None:
        """Return the hashes of a recorded generation's blocks, or None if it was never asked."""
        row = self._db.execute("SELECT blocks FROM generations WHERE generation=?", (generation,)).fetchone()
        return None if row is None else list(json.loads(row[0]))

    def is_told(self, generation: int) -> bool:
        """Whether a generation is complete."""
        row = self._db.execute("SELECT told FROM generations WHERE generation=?", (generation,)).fetchone()
        return row is not None and bool(row[0])

    def candidates(self, generation: int | None = None) -> list[CandidateRow]:
        """Return the candidates of a generation (or of all), in order."""
        where, arguments = ("", ()) if generation is None else ("WHERE generation=?", (generation,))
        rows = self._db.execute(
            "SELECT id, generation, position, genotype, recipe, status, fitness, rank, reason "
            f"FROM candidates {where} ORDER BY id",
            arguments,
        )
        return [
            CandidateRow(number, of, position, tuple(json.loads(genotype)), *rest)
            for number, of, position, genotype, *rest in rows
        ]

    def tell(self, generation: int, told: Sequence[CandidateRow]) -> None:
        """Record the fitness and ranks of a complete generation."""
        with self.transaction():
            for row in told:
                self._db.execute(
                    "UPDATE candidates SET status=?, fitness=?, rank=?, reason=? WHERE id=?",
                    (row.status, row.fitness, row.rank, row.reason, row.id),
                )
            self._db.execute("UPDATE generations SET told=1 WHERE generation=?", (generation,))

    def add_result(self, outcome: Outcome, block: str, worker: str) -> None:
        """Record one recipe's outcome on one block; the first one recorded stands."""
        with self.transaction():
            added = self._db.execute(
                "INSERT OR IGNORE INTO results VALUES (?,?,?,?,?,?,?,?)",
                (
                    outcome.recipe,
                    block,
                    outcome.failure,
                    worker,
                    outcome.cached,
                    outcome.merge_seconds,
                    outcome.score_seconds,
                    time.time(),
                ),
            )
            if added.rowcount:
                self._db.executemany(
                    "INSERT INTO scores VALUES (?,?,?,?,?,?,?)",
                    [
                        (outcome.recipe, block, s.item, s.task, s.raw, s.value, s.truncated)
                        for s in outcome.scores
                    ],
                )

            if any(outcome.layers):
                computed, saved = self.layer_evaluations()
                self._set_meta(
                    "layer_evaluations", [computed + outcome.layers.computed, saved + outcome.layers.saved]
                )

    def layer_evaluations(self) -> LayerEvaluations:
        """Return what the layers of all candidates took, as far as engines count that."""
        return LayerEvaluations(*self.meta("layer_evaluations", (0, 0)))

    def results(self, recipe: str) -> dict[str, str | None]:
        """Return block hash → reason of failure (None if scored) of everything known of a recipe."""
        rows = self._db.execute("SELECT block, failure FROM results WHERE recipe=?", (recipe,))
        return dict(rows.fetchall())

    def scores(self, recipe: str, block: str) -> list[ItemScore]:
        """Return the recorded scores of one recipe on one block, ordered by item."""
        rows = self._db.execute(
            "SELECT item, task, raw, value, truncated FROM scores WHERE recipe=? AND block=? ORDER BY item",
            (recipe, block),
        )
        return [
            ItemScore(item, task, raw, value, None if cut is None else bool(cut))
            for item, task, raw, value, cut in rows
        ]

    def add_attempt(self, work: str, worker: str, reason: str) -> None:
        """Record that a worker was lost while it held a request."""
        with self.transaction():
            self._db.execute(
                "INSERT INTO attempts (work, worker, reason, recorded) VALUES (?,?,?,?)",
                (work, worker, reason, time.time()),
            )

    def add_short_list(self, round_: int, entries: Sequence[tuple[str, Recipe, int | None]]) -> None:
        """Freeze a round's short list: (name, recipe, id of the candidate it came from)."""
        with self.transaction():
            for position, (name, recipe, candidate) in enumerate(entries):
                self.add_recipe(recipe)
                self._db.execute(
                    "INSERT INTO short_list VALUES (?,?,?,?,?)",
                    (round_, position, name, recipe.hash, candidate),
                )

    def short_list(self, round_: int) -> list[tuple[str, str, int | None]]:
        """Return a round's frozen short list as (name, recipe hash, candidate id)."""
        rows = self._db.execute(
            "SELECT name, recipe, candidate FROM short_list WHERE round=? ORDER BY position", (round_,)
        )
        return [tuple(row) for row in rows]

    def set_winner(self, round_: int, recipe: str, name: str) -> None:
        """Record a round's winner."""
        with self.transaction():
            self._db.execute("INSERT INTO winners VALUES (?,?,?)", (round_, recipe, name))

    def winner(self, round_: int | None = None) -> tuple[str, str] | None:
        """Return (recipe hash, name) of a round's winner, or of the latest one."""
        where, arguments = ("", ()) if round_ is None else ("WHERE round=?", (round_,))
        return self._db.execute(  # type: ignore[no-any-return]
            f"SELECT recipe, name FROM winners {where} ORDER BY round DESC LIMIT 1", arguments
        ).fetchone()

    def open_test(self, round_: int, reason: str) -> int:
        """Record that the test items are about to be seen; return how many rounds have seen them."""
        with self.transaction():
            self._db.execute(
                "INSERT OR IGNORE INTO test_openings VALUES (?,?,?)", (round_, reason, time.time())
            )
        return self.test_openings()

    def test_openings(self) -> int:
        """Return how often the test items were opened."""
        return int(self._db.execute("SELECT COUNT(*) FROM test_openings").fetchone()[0])

    def counts(self) -> Mapping[str, int]:
        """Return how many candidates were told, failed, and stopped early; how many items were scored, and cached.

        An item that an earlier run had scored counts like any other, so that the number does not depend on what
        the cache held.
        """
        row = self._db.execute(
            "SELECT COUNT(*) FILTER (WHERE status != 'asked'), COUNT(*) FILTER (WHERE status = 'failed'), "
            "COUNT(*) FILTER (WHERE status = 'screened') FROM candidates"
        ).fetchone()
        scored = self._db.execute("SELECT COUNT(*) FROM scores").fetchone()[0]
        cached = self._db.execute("SELECT COALESCE(SUM(cached), 0) FROM results").fetchone()[0]
        return {
            "candidates": row[0],
            "failed": row[1],
            "screened": row[2],
            "item_evaluations": scored,
            "cached_item_evaluations": cached,
        }

    def seconds(self) -> tuple[float, float, int]:
        """Return what workers spent with merging and with scoring, and on how many recipes."""
        return self._db.execute(  # type: ignore[no-any-return]
            "SELECT COALESCE(SUM(merge_seconds), 0), COALESCE(SUM(score_seconds), 0), "
            "COUNT(DISTINCT CASE WHEN merge_seconds > 0 THEN recipe END) FROM results"
        ).fetchone()

    def canonical(self) -> dict[str, list[tuple[Any, ...]]]:
        """Return the contents that do not depend on times, attempts or hosts."""
        return {
            table: sorted(self._db.execute(f"SELECT {columns} FROM {table}").fetchall(), key=repr)
            for table, columns in CANONICAL.items()
        }

    def backup(self, target: Path) -> None:
        """Copy the database to `target` with SQLite's backup API."""
        try:
            copy = sqlite3.connect(target)
            try:
                self._db.backup(copy)
            finally:
                copy.close()
        except sqlite3.Error as error:
            raise InfrastructureError(f"{target}: cannot be written: {error}") from None

    def query(self, sql: str) -> tuple[list[str], list[tuple[Any, ...]]]:
        """Run a SELECT; return column names and rows."""
        cursor = self._db.execute(sql)
        return [column[0] for column in cursor.description], cursor.fetchall()

    def _set_meta(self, key: str, value: Any) -> None:
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?,?)", (key, json.dumps(value)))

    def _check_version(self) -> None:
        try:
            version = self.meta("schema_version")
        except sqlite3.DatabaseError as error:
            raise UserError(f"{self.path}: not a run database: {error}") from None
        if version != SCHEMA_VERSION:
            raise UserError(
                f"{self.path}: made by another version of evomerge (schema {version}, this one reads "
                f"{SCHEMA_VERSION}); resume it with the version that made it"
            )


def _on_shared_file_system(path: Path) -> bool:
    """Whether the file lies on a network file system, where SQLite's write-ahead log is not safe."""
    try:
        mounts = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return False
    resolved, best, kind = str(path.parent.resolve()), "", ""
    for line in mounts:
        _, mount, file_system, *_ = line.split()
        inside = resolved == mount or resolved.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best):
            best, kind = mount, file_system
    return kind.startswith(_SHARED_FILE_SYSTEMS)
