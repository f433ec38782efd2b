"""A reader of compiled programs: FLOPs, traffic, collectives and memory, with the trip counts of loops."""

from jpeft.planning.hlo.collectives import Collective as Collective
from jpeft.planning.hlo.collectives import replica_groups as replica_groups
from jpeft.planning.hlo.liveness import Buffer as Buffer
from jpeft.planning.hlo.program import Program as Program
from jpeft.planning.hlo.program import read as read
from jpeft.planning.hlo.refusals import Refusal as Refusal
from jpeft.planning.hlo.refusals import read_refusal as read_refusal
