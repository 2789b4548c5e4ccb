"""A search's storage in a database, asked in fewer round trips."""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sa
from optuna.distributions import check_distribution_compatibility, distribution_to_json
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.trial import TrialState
from sqlalchemy.dialects import postgresql

_OPEN = [state for state in TrialState if not state.is_finished()]


class Database(RDBStorage):
    """Optuna's database. On PostgreSQL a word about a trial, or a choice of it, is one statement in the place of two.

    That the trial has not ended is a condition of the statement. Where it is not met, Optuna's own way says what is wrong.
    """

    def _set_trial_attr_without_commit(self, session: Any, model_cls: Any, trial_id: int, key: str, value: Any) -> None:
        if self.engine.name == "postgresql":
            table = model_cls.__table__
            statement = postgresql.insert(table).from_select(
                ["trial_id", "key", "value_json"], _while_open(trial_id, sa.literal(key), sa.literal(json.dumps(value)))
            )
            found = session.connection().execute(
                statement.on_conflict_do_update(
                    index_elements=[table.c.trial_id, table.c.key], set_={"value_json": statement.excluded.value_json}
                )
            )
            if found.rowcount:
                return
        super()._set_trial_attr_without_commit(session, model_cls, trial_id, key, value)

    def _set_trial_param_without_commit(
        self,
        session: Any,
        trial_id: int,
        param_name: str,
        param_value_internal: float,
        distribution: Any,
        previous_distribution: Any = None,
    ) -> None:
        if self.engine.name == "postgresql" and previous_distribution is not None:
            check_distribution_compatibility(previous_distribution, distribution)
            values = (sa.literal(param_name), sa.literal(param_value_internal), sa.literal(distribution_to_json(distribution)))
            statement = sa.insert(models.TrialParamModel.__table__).from_select(
                ["trial_id", "param_name", "param_value", "distribution_json"], _while_open(trial_id, *values)
            )
            if session.connection().execute(statement).rowcount:
                return
        super()._set_trial_param_without_commit(
            session, trial_id, param_name, param_value_internal, distribution, previous_distribution
        )


def _while_open(trial_id: int, *values: Any) -> Any:
    """Return a query of one row, the trial and the values; of none where the trial has ended or is not there."""
    table = models.TrialModel.__table__
    return sa.select(table.c.trial_id, *values).where(table.c.trial_id == trial_id, table.c.state.in_(_OPEN))
