"""The commands of `farspan`, one file each. server/cli.py names them."""
