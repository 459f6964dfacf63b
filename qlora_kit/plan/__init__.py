"""What a run will take, found by running its step on tensors that have shapes and no bytes."""

from qlora_kit.plan.devices import available_bytes
from qlora_kit.plan.dry_run import dry_run
from qlora_kit.plan.sizes import weight_bytes
from qlora_kit.plan.table import plan_methods
from qlora_kit.plan.workload import Workload

__all__ = ["Workload", "available_bytes", "dry_run", "plan_methods", "weight_bytes"]
