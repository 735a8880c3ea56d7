"""The servers of the pretend Internet: HTTP that answers with the caller's address, and DNS that logs every question and knows one answer."""

import socket
import struct
import sys
import threading

folder = sys.argv[1]
WEB = "203.0.113.2"


def log(name, line):
    with open(f"{folder}/{name}", "a") as file:
        file.write(line + "\n")


def http():
    server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind(("0.0.0.0", 80))
    server.listen(64)
    log("http.log", "ready")
    while True:
        client, (address, _) = server.accept()
        client.settimeout(2)
        try:
            client.recv(4096)
            body = address + "\n"
            client.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode())
        except OSError:
            pass
        client.close()
        log("http.log", address)


def dns():
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind(("0.0.0.0", 53))
    while True:
        question, caller = server.recvfrom(4096)
        labels, at = [], 12
        while question[at]:
            labels.append(question[at + 1 : at + 1 + question[at]].decode("ascii", "replace"))
            at += 1 + question[at]
        kind = struct.unpack(">H", question[at + 1 : at + 3])[0]
        log("dns.log", f"{caller[0]} {'.'.join(labels).lower()}")
        asked = question[12 : at + 5]
        answers = b""
        if kind == 1:
            answers = b"\xc0\x0c" + struct.pack(">HHIH", 1, 1, 1, 4) + socket.inet_aton(WEB)
        header = question[:2] + struct.pack(">HHHHH", 0x8580, 1, 1 if answers else 0, 0, 0)
        server.sendto(header + asked + answers, caller)


threading.Thread(target=http, daemon=True).start()
dns()
