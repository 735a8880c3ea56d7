# The services of a desktop on its session bus. Usage: service.py LOG. Appends each call to LOG, and prints "ready".
import os
import sys

import gi

gi.require_version("Gio", "2.0")
from gi.repository import Gio, GLib

LOG = sys.argv[1]
NOTIFICATIONS = """<node><interface name="org.freedesktop.Notifications">
<method name="Notify"><arg type="s" direction="in"/><arg type="u" direction="in"/><arg type="s" direction="in"/>
<arg type="s" direction="in"/><arg type="s" direction="in"/><arg type="as" direction="in"/><arg type="a{sv}" direction="in"/>
<arg type="i" direction="in"/><arg type="u" direction="out"/></method>
<method name="GetServerInformation"><arg type="s" direction="out"/><arg type="s" direction="out"/>
<arg type="s" direction="out"/><arg type="s" direction="out"/></method>
<method name="GetCapabilities"><arg type="as" direction="out"/></method>
</interface><interface name="org.example.Shell"><method name="Run"/></interface></node>"""
SYSTEMD = """<node><interface name="org.freedesktop.systemd1.Manager"><method name="StartTransientUnit"/></interface></node>"""
PORTAL = """<node><interface name="org.freedesktop.portal.OpenURI">
<method name="OpenURI"><arg type="s" direction="in"/></method><property name="version" type="u" access="read"/></interface>
<interface name="org.freedesktop.portal.Settings">
<method name="Read"><arg type="s" direction="in"/><arg type="s" direction="out"/></method>
<method name="Shout"><arg type="s" direction="in"/></method>
<property name="version" type="u" access="read"/></interface>
<interface name="org.freedesktop.portal.Trash">
<method name="TrashFile"><arg type="h" direction="in"/><arg type="h" direction="in"/><arg type="s" direction="out"/></method></interface>
<interface name="org.freedesktop.portal.Camera"><method name="OpenPipeWireRemote"><arg type="h" direction="out"/></method>
</interface></node>"""
OBJECTS = {
    "org.freedesktop.Notifications": ("/org/freedesktop/Notifications", NOTIFICATIONS),
    "org.freedesktop.systemd1": ("/org/freedesktop/systemd1", SYSTEMD),
    "org.freedesktop.portal.Desktop": ("/org/freedesktop/portal/desktop", PORTAL),
}


def passed(fds, index):
    fd = fds.get(index)
    os.lseek(fd, 0, os.SEEK_SET)
    with os.fdopen(fd) as file:
        return file.read()


def call(connection, sender, path, interface, member, arguments, invocation):
    if member != "Shout":
        with open(LOG, "a") as log:
            log.write(f"{interface}.{member} {str(arguments)[:60]}\n")
    if member == "Notify":
        # What it has to say about the text's length goes to the sender alone.
        body = arguments.unpack()[4]
        invocation.return_value(GLib.Variant("(u)", (max(1, len(body)),)))
    elif member == "GetServerInformation":
        invocation.return_value(GLib.Variant("(ssss)", ("a", "b", "c", "1.2")))
    elif member == "GetCapabilities":
        invocation.return_value(GLib.Variant("(as)", ([],)))
    elif member == "Read":
        (text,) = arguments.unpack()
        invocation.return_value(GLib.Variant("(s)", ("x" * int(text) if text.isdigit() else text,)))
    elif member == "Shout":
        invocation.return_value(None)
        for destination in (None, sender):
            connection.emit_signal(destination, path, interface, "Changed", arguments)
    elif member == "TrashFile":
        fds = invocation.get_message().get_unix_fd_list()
        text = "+".join(passed(fds, index) for index in arguments.unpack())
        invocation.return_value(GLib.Variant("(s)", (text,)))
    elif member == "OpenPipeWireRemote":
        (reading, writing) = os.pipe()
        os.write(writing, b"from the portal")
        os.close(writing)
        fds = Gio.UnixFDList.new_from_array([reading])
        invocation.return_value_with_unix_fd_list(GLib.Variant("(h)", (0,)), fds)
    else:
        invocation.return_value(None)


def get(connection, sender, path, interface, name):
    return GLib.Variant("u", 7)


bus = Gio.bus_get_sync(Gio.BusType.SESSION)
left = set(OBJECTS)


def owned(connection, name):
    left.discard(name)
    if not left:
        print("ready", flush=True)


for name, (path, text) in OBJECTS.items():
    for interface in Gio.DBusNodeInfo.new_for_xml(text).interfaces:
        bus.register_object(path, interface, call, get, None)
    Gio.bus_own_name_on_connection(bus, name, 0, owned, None)
GLib.MainLoop().run()
