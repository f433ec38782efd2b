"""What a training step will need of chips that one does not have: compiled for them, on this machine.

print(jpeft.plan(step, state, params, batch, topology="v5e:4x4", mesh="fsdp=16"))
"""

from jpeft.planning.compiling import PlanError as PlanError
from jpeft.planning.plan import plan as plan
from jpeft.planning.result import Plan as Plan
