"""Plans of training steps for hardware that is not attached, from programs compiled for it on this machine.

Example::

    print(jpeft.plan(step, state, params, batch, topology="v5e:4x4", mesh="fsdp=16"))
"""

from jpeft.errors import PlanError as PlanError
from jpeft.planning.plan import plan as plan
from jpeft.planning.result import Plan as Plan
