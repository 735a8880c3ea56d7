# A program that runs once: a second one hands over what it is to open. usage: app.py LOG WHERE [hold] [URI]
import sys

import gi

gi.require_version("Gio", "2.0")
from gi.repository import Gio

(log, where), arguments = sys.argv[1:3], sys.argv[3:]
app = Gio.Application(application_id="net.example.App", flags=Gio.ApplicationFlags.HANDLES_OPEN)


def write(text):
    with open(log, "a") as file:
        file.write(f"{where} {text}\n")


app.connect("open", lambda app, files, count, hint: write(f"opens {files[0].get_uri()}"))
app.connect("activate", lambda app: write("is activated"))
if "hold" in arguments:
    arguments.remove("hold")
    app.hold()
sys.exit(app.run(sys.argv[:1] + arguments))
