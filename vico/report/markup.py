"""HTML elements. Texts and attributes are escaped where they are written out, in one place."""

from collections.abc import Iterable, Sequence
from xml.etree.ElementTree import Element, SubElement, tostring


def element(
    tag: str, text: str = "", children: Iterable[Element] = (), **attributes: str
) -> Element:
    """An element. `attributes`: by name; `class_` is class, `aria_label` is aria-label."""
    names = {name.strip("_").replace("_", "-"): value for name, value in attributes.items()}
    made = Element(tag, names)
    made.text = text
    made.extend(children)
    return made


def table(
    caption: str, header: Sequence[str], rows: Iterable[Sequence[str | Element]], kind: str = ""
) -> Element:
    """A table below its caption, which scrolls within itself. A row's first cell is its heading.

    `kind`: a class of page.css.
    """
    made = element("table", class_=kind, aria_label=caption)
    head = SubElement(SubElement(made, "thead"), "tr")
    head.extend(element("th", text, scope="col") for text in header)
    body = SubElement(made, "tbody")
    for row in rows:
        line = SubElement(body, "tr")
        for i, cell in enumerate(row):
            holder = element("td") if i else element("th", scope="row")
            if isinstance(cell, str):
                holder.text = cell
            else:
                holder.append(cell)
            line.append(holder)
    scroller = element("div", class_="scroll", tabindex="0", role="region", children=[made])
    scroller.set("aria-label", caption)
    return element("div", children=[element("p", caption, class_="caption"), scroller])


def to_html(node: Element) -> str:
    return tostring(node, encoding="unicode", method="html")
