#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# The status page: plain text, so that a test can read it as well as a person.
read -r starts < "${SERVICE_DATA:-/data}/starts" 2> /dev/null || starts=unknown
read -r up _ < /proc/uptime
printf 'Content-Type: text/plain\r\nCache-Control: no-store\r\n\r\n'
printf 'example-service on %s\nstarts: %s\nuptime: %s s\n' "$(hostname)" "$starts" "$up"
