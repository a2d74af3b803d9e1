"""What a browser sends back of a page that nobody touched."""

from html.parser import HTMLParser


def form_data(page):
    """The names and values of the inputs, textareas and selects of a page."""
    parser = _Inputs()
    parser.feed(page)
    return parser.data


class _Inputs(HTMLParser):
    def __init__(self):
        super().__init__()
        self.data = {}
        self._textarea = self._select = None

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        name, value = attributes.get("name"), attributes.get("value", "")
        if "disabled" in attributes:
            return
        if tag == "input" and name and attributes["type"] in ("text", "number", "hidden"):
            self.data[name] = value
        elif tag == "textarea":
            self._textarea, self.data[name] = name, ""
        elif tag == "select":
            self._select, self.data[name] = name, ""
        elif tag == "option" and "selected" in attributes:
            self.data[self._select] = value

    def handle_endtag(self, tag):
        if tag == "textarea":
            self._textarea = None

    def handle_data(self, text):
        if self._textarea:
            self.data[self._textarea] += text.strip()
