#!/bin/sh
ip link add wg0 type wireguard
