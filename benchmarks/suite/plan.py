"""Everything that one worker process times, in order."""

from . import machine, models, operator_peers, operators, overhead
from .groups import Group, select
from .options import Options


def make_plan(options: Options, malloc: str) -> list[Group]:
    """The groups under this malloc setting, cut down to --filter.

    torch.compile is left out under malloc's defaults, and so are the models with --quick or of all networks: each would
    cost a second compilation or a second run of the slowest part. A call on a kilobyte does not depend on malloc's
    thresholds. With --peers there are models alone on a CPU, and operators that other packages compute on a GPU.
    """
    if options.peers and options.device != "cpu":
        plan = [g for g in operators.groups(options, compiled=True) if operator_peers.of(g.operator.partition(" ")[0])]
        return select(plan, options.filter, malloc)
    if options.peers:
        return select(models.groups(options), options.filter, malloc) if malloc == "tuned" else []
    only = machine.malloc_settings(options.device) == ("default",)
    groups = overhead.groups(options) if malloc == "default" else []
    groups += operators.groups(options, compiled=malloc != "default" or only)
    if malloc != "default" or only or not (options.quick or options.networks == "all"):
        groups += models.groups(options)
    return select(groups, options.filter, malloc)
