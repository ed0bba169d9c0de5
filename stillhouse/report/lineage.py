"""The lineage of a chain: a column for each distance from the first steps, lines between them.

Nodes are HTML, placed in percent, so that text keeps its size; lines are drawn in a square that the
page stretches over the box.
"""

from graphlib import TopologicalSorter

from markupsafe import Markup

from stillhouse.report.blocks import Lineage
from stillhouse.report.charts import SIZE
from stillhouse.report.formatting import visible

_ROW_EM = 6.5
_COLUMN_EM = 11
_EDGE = 0.42
"""Half of a node's width, as a share of its column."""


def lineage(data: Lineage) -> Markup:
    """Nodes with their links, and curves from what each one needs."""
    needs, column = {node.name: node.needs for node in data.nodes}, dict[str, int]()
    for name in TopologicalSorter(needs).static_order():  # nodes come in any order
        column[name] = max((column[one] + 1 for one in needs[name]), default=0)
    columns = [
        [node.name for node in data.nodes if column[node.name] == c]
        for c in range(max(column.values()) + 1)
    ]
    most = max(len(names) for names in columns)
    place = {
        name: ((c + 0.5) / len(columns), (row + 0.5) / len(names))
        for c, names in enumerate(columns)
        for row, name in enumerate(names)
    }
    edge = _EDGE / len(columns)
    lines = Markup("").join(
        _curve(place[one], place[node.name], edge, column[node.name] - column[one] > 1)
        for node in data.nodes
        for one in node.needs
    )
    nodes = Markup("").join(
        Markup(
            '<a class="node" href="{}" style="left:{:.2f}%;top:{:.2f}%;width:{:.2f}%">'
            "<b>{}</b><small>{}</small><span>{}</span></a>"
        ).format(
            node.link,
            100 * place[node.name][0],
            100 * place[node.name][1],
            200 * edge,
            visible(node.name),
            visible(node.job),
            visible(node.headline),
        )
        for node in data.nodes
    )
    return Markup(
        '<div class="scroll"><div class="lineage" style="height:{}em;min-width:{}em">'
        '<svg viewBox="0 0 {} {}" preserveAspectRatio="none" aria-hidden="true">{}</svg>{}'
        "</div></div>"
    ).format(_ROW_EM * most, _COLUMN_EM * len(columns), SIZE, SIZE, lines, nodes)


def _curve(start: tuple[float, float], end: tuple[float, float], edge: float, far: bool) -> Markup:
    """From the right side of a node to the left side of another; `far` ones pass above."""
    (x, y), (to_x, to_y) = (start[0] + edge, start[1]), (end[0] - edge, end[1])
    middle = (x + to_x) / 2
    bend = (x, -0.1, to_x, -0.1) if far and y == to_y else (middle, y, middle, to_y)
    points = [round(SIZE * value) for value in (x, y, *bend, to_x, to_y)]
    return Markup('<path class="edge" d="M{} {}C{} {} {} {} {} {}"/>').format(*points)
