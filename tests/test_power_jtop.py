"""Our adapter on the server of jetson-stats itself, which runs on its own test hooks (JTOP_TESTING).

The hooks fix the places: /fake_sys for the sensors, /run/jtop.sock, a group "jtop". So server and client run in a mount
namespace of their own, on a writable overlay of this machine's root that vanishes with it. That takes root and
jetson-stats, which is no dependency of the tests (AGPL-3.0): pip install 'remoe-edge[jetson]'. What the adapter does
without them is tested through a stand-in in test_power_sources.py.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_jetson import VDD_IN_WATTS, cpufreq, ina3221, write

_NAMESPACE = """
set -e
mount -t tmpfs tmpfs "$1"
mkdir "$1/upper" "$1/work" "$1/root" "$1/virtual"
mkdir -p "$1/virtual/dmi/id"
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" "$1/root"
for folder in proc sys dev; do mount --rbind "/$folder" "$1/root/$folder"; done
mount --bind "$1/virtual" "$1/root/sys/devices/virtual"
echo "jtop:x:4242:" >> "$1/root/etc/group"
cp -r "$2" "$1/root/fake_sys"
exec chroot "$1/root" "$3" -c "$4"
"""

_PROBE = """
import json, time
from jtop.service import JtopServer
from remoe_edge.power.jtop import JtopSource
from remoe_edge.power.sampler import Sampler

server = JtopServer()
server.start()
try:
    source = JtopSource(0.1)
    with Sampler(source) as sampler:
        time.sleep(1.5)
        while_up = sampler.recording()
        server.terminate()
        server.broadcaster.shutdown()
        time.sleep(1.5)
    recording = sampler.recording()
finally:
    server.kill()
print(json.dumps({
    "sensor": source.sensor, "period": source.period_s, "watts": list(while_up.watts), "status": while_up.status,
    "later": recording.status, "reason": recording.reason, "samples": len(recording.t_ns),
}))
"""


@pytest.mark.skipif(importlib.util.find_spec("jtop") is None, reason="jetson-stats is not installed")
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare")
def test_the_server_of_jetson_stats_is_read_and_may_go_away(tmp_path: Path) -> None:
    fake, place = tmp_path / "fake_sys", tmp_path / "place"
    place.mkdir()
    sensor = ina3221(tmp_path / "host", 6)
    shutil.copytree(sensor, fake / "bus/i2c/devices/1-0040/hwmon/hwmon1")
    write(fake / "bus/i2c/devices/1-0040/name", "ina3221")
    write(fake / "stat", "cpu  9 9 9 9 9 0 9 0 0 0\ncpu0 9 9 9 9 9 0 9 0 0 0\nintr 1")
    cpufreq(tmp_path / "host", 0, low=729600, high=1984000, now=1984000)
    shutil.copytree(tmp_path / "host/sys/devices", fake / "devices")
    frequencies = fake / "devices/system/cpu/cpu0/cpufreq"
    for name in "min", "max", "cur":
        write(frequencies / f"cpuinfo_{name}_freq", 1984000)
    for folder in "class/devfreq", "class/hwmon":
        (fake / folder).mkdir(parents=True)
    command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", _NAMESPACE, "sh"]
    done = subprocess.run(
        [*command, str(place), str(fake), sys.executable, _PROBE],
        env={**os.environ, "JTOP_TESTING": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["sensor"], result["period"], result["status"]) == ("VDD_IN", 0.1, "measured")
    # jtop gives whole milliwatts.
    assert result["watts"] == pytest.approx([VDD_IN_WATTS] * len(result["watts"]), abs=0.001)
    assert 5 <= len(result["watts"]) <= 16
    assert result["later"] == "partial"
    assert "jtop's service went away" in result["reason"]
    assert not Path("/fake_sys").exists()
