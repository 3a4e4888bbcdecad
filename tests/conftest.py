"""What tests of several rooms share."""

pytest_plugins = ("hub_server",)
