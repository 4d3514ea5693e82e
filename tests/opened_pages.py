"""A page in a browser, with all that it asks for and complains about."""

SIZES = {"phone": (390, 844), "desk": (1280, 900)}


class Opened:
    """A page with all that it asked for and complained about."""

    def __init__(self, browser, folder, size="desk", scheme="light", **options):
        width, height = SIZES[size]
        self.context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, **options
        )
        self.page = self.context.new_page()
        self.requests, self.complaints = [], []
        self.page.on("console", lambda m: self.complaints.append(m.text))
        self.page.on("pageerror", lambda e: self.complaints.append(str(e)))
        self.page.on("dialog", self.refuse)
        self.address = (folder / "report.html").as_uri()
        self.context.route("**/*", self.watch)
        self.page.goto(self.address)

    def refuse(self, dialog):
        self.complaints.append(f"a dialog: {dialog.message}")
        dialog.dismiss()

    def watch(self, route):
        address = route.request.url
        if address == self.address or address.startswith("data:"):
            route.continue_()
        else:
            self.requests.append(address)
            route.abort()

    def __enter__(self):
        return self.page

    def __exit__(self, kind, error, trace):
        self.context.close()
        if kind is None:
            assert not self.complaints and not self.requests
