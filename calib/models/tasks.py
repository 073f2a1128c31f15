# SPDX-License-Identifier: Apache-2.0
"""Which task a checkpoint is for and which class runs it, in the words of optimum's `TasksManager`.

The hub knows the task of a hub id. For files on disk the architecture that the configuration names decides, and that
very class is used, so that what runs is what was saved.
"""

from __future__ import annotations

import logging
from typing import Any

from calib.errors import ModelError, UsageError
from calib.models.checkpoint import Checkpoint

__all__ = [
    "UNKNOWN_TASK",
    "check_task",
    "choose_class",
    "choose_task",
    "task_of_architecture",
    "task_of_class",
    "tasks_of_model_type",
]

logger = logging.getLogger(__name__)

UNKNOWN_TASK = "unknown"
# For classes that optimum has in no table: code that a checkpoint brings, heads for pre-training, encoder halves.
TASK_OF_SUFFIX = {
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMultipleChoice": "multiple-choice",
    "ForImageClassification": "image-classification",
    "ForConditionalGeneration": "text2text-generation",
    "ForPreTraining": "feature-extraction",
    "Model": "feature-extraction",
}
# optimum lists a class under the first of its tasks, in alphabetical order; these are the ones it is used for.
PREFERRED_TASK = {
    ("ForConditionalGeneration", "fill-mask"): "text2text-generation",
    ("ForConditionalGeneration", "image-to-text"): "image-text-to-text",
}


def check_task(task: str) -> str:
    """The canonical name of a task, synonyms allowed (`causal-lm` is `text-generation`).

    Raises:
        UsageError: no task has this name.
    """
    from optimum.exporters.tasks import TasksManager

    known = sorted(TasksManager.get_all_tasks())
    canonical = str(TasksManager.map_from_synonym(task))
    if canonical not in known:
        raise UsageError(f"task {task!r}: unknown; choose one of {', '.join(known)}")
    return canonical


def task_of_class(cls: type) -> str | None:
    """The task of a model class, or None."""
    from optimum.exporters.tasks import TasksManager

    try:
        task = str(TasksManager.infer_task_from_model(cls))
    except (KeyError, ValueError):
        return next(
            (t for suffix, t in TASK_OF_SUFFIX.items() if _is_model(cls) and cls.__name__.endswith(suffix)), None
        )
    return next((t for (s, old), t in PREFERRED_TASK.items() if old == task and cls.__name__.endswith(s)), task)


def task_of_architecture(architecture: str) -> str | None:
    """The task of a class name, e.g. text-generation for LlamaForCausalLM; None if the name tells nothing."""
    import transformers

    cls = getattr(transformers, architecture, None)
    if cls is not None:
        return task_of_class(cls)
    return next((task for suffix, task in TASK_OF_SUFFIX.items() if architecture.endswith(suffix)), None)


def choose_task(checkpoint: Checkpoint, name: str, *, hub_id: str | None, revision: str | None) -> str:
    """Decide the task when the user did not: the hub's word for a hub id, else the architecture.

    Raises:
        ModelError: nothing names a task.
    """
    if hub_id is not None:
        inferred = _task_of_hub_id(hub_id, revision)
        # A tag of the hub is free text; it counts where a class of this model type serves it.
        if inferred in tasks_of_model_type(checkpoint.model_type):
            return inferred
    architecture = checkpoint.architecture
    if architecture is None:
        raise ModelError(f"model {name}: config.json names no architecture; pass --task, e.g. --task text-generation")
    inferred = task_of_architecture(architecture)
    if inferred is None:
        raise ModelError(f"model {name}: no task is known for architecture {architecture}; pass --task")
    return inferred


def choose_class(checkpoint: Checkpoint, name: str, task: str, *, trust_remote_code: bool) -> Any:
    """The class to load with: the saved architecture if it serves the task, else the auto class of the task.

    Raises:
        ModelError: no class runs this task for this model type.
    """
    import transformers
    from optimum.exporters.tasks import TasksManager

    brings_code = trust_remote_code and bool(checkpoint.config.get("auto_map"))
    architecture = checkpoint.architecture
    saved = None if architecture is None or brings_code else getattr(transformers, architecture, None)
    if saved is not None and task_of_class(saved) == task:
        return saved
    possible = tasks_of_model_type(checkpoint.model_type)
    if task not in possible and not brings_code:
        raise ModelError(
            f"model {name}: {checkpoint.model_type} has no model class for {task}; pass --task {' or '.join(possible)}"
        )
    return TasksManager.get_model_class_for_task(task, framework="pt", model_type=checkpoint.model_type)


def tasks_of_model_type(model_type: str) -> list[str]:
    """The tasks for which transformers has a class of this model type, sorted."""
    from optimum.exporters.tasks import TasksManager

    # optimum has no public reader for this table.
    table = TasksManager._TRANSFORMERS_TASKS_TO_MODEL_MAPPINGS
    return sorted(task for task, classes in table.items() if model_type in classes)


def _is_model(cls: type) -> bool:
    from transformers import PreTrainedModel

    return issubclass(cls, PreTrainedModel)


def _task_of_hub_id(hub_id: str, revision: str | None) -> str | None:
    from optimum.exporters.tasks import TasksManager

    try:
        task = str(TasksManager.infer_task_from_model(hub_id, revision=revision))
    except Exception as error:
        # Offline, behind a proxy, not tagged ...: whatever the hub client raises, the architecture still decides.
        logger.debug("the hub did not tell the task of %s: %s", hub_id, error)
        return None
    return task if task in TasksManager.get_all_tasks() else None
