"""Programs that mean harm. `CANARY` stands for a file that anyone may write, in a folder that anyone may write."""

BUSY = "while True:\n        try:\n            pass\n        except:\n            pass"

CHECKED = {
    "endless loop": ("def f():\n    while True:\n        pass", {"timeout"}),
    "loop in except": (f"def f():\n    {BUSY}", {"timeout"}),
    "loop that catches all": (
        "def f():\n    while True:\n        try:\n            while True:\n                pass\n"
        "        except (KeyboardInterrupt, SystemExit, BaseException):\n            continue",
        {"timeout"},
    ),
    "loop while being read": (f"if True:\n    {BUSY}\n\ndef f():\n    return 1", {"timeout"}),
    "endless generator": (
        "def g(n=0):\n    while True:\n        yield n\n\ndef f():\n    return sum(g())",
        {"timeout"},
    ),
    "power": ("def f():\n    return 9**9**9", {"timeout", "memory"}),
    "pow": ("def f():\n    return pow(9, pow(9, 9))", {"timeout", "memory"}),
    "constant folding": ("def f():\n    return (((1 << 60000) ** 9) ** 9) ** 9", {"timeout", "memory", "error"}),
    "factorial": ("import math\n\ndef f():\n    return math.factorial(10**8)", {"timeout", "memory"}),
    "list": ("def f():\n    return len([0] * 10**10)", {"memory"}),
    "growing list": ("def f():\n    x = [1] * 1000\n    while True:\n        x += x", {"memory", "timeout"}),
    "small objects": ("def f():\n    x = []\n    while True:\n        x = [x, [9.5] * 9000]", {"memory", "timeout"}),
    "bytes": ("def f():\n    return len(bytes(10**10))", {"memory"}),
    "string": ("def f():\n    return len('ab' * 10**10)", {"memory"}),
    "format width": ("def f():\n    return len(f'{1:>9999999999}')", {"memory"}),
    "sum of range": ("def f():\n    return sum(range(10**12))", {"timeout"}),
    "recursion": ("def f():\n    return f()", {"error"}),
    "recursive repr": ("def f():\n    x = []\n    x.append(x)\n    return str(x)", {"error"}),
    "nested repr": (
        "def f():\n    x = []\n    for _ in range(100000):\n        x = [x]\n    return repr(x)",
        {"error"},
    ),
    "nested error": (
        "def f():\n    x = []\n    for _ in range(100000):\n        x = [x]\n    raise ValueError(x)",
        {"error"},
    ),
    "SystemExit": ("def f():\n    raise SystemExit(0)", {"error"}),
    "KeyboardInterrupt": ("raise KeyboardInterrupt\n\ndef f():\n    return 1", {"error"}),
    "GeneratorExit": ("def f():\n    raise GeneratorExit", {"error"}),
    "printing": ("def f():\n    while True:\n        print('x' * 10**6)", {"timeout"}),
    "huge string": ("def f():\n    return '1' * 10**7", {"error"}),
    "huge int": ("def f():\n    return 1 << 10**7", {"error"}),
    "huge error": ("def f():\n    raise ValueError('x' * 10**7)", {"error", "memory"}),
    "lambda": ("def f():\n    return lambda: 1", {"error"}),
    "lying class": (
        "def f():\n    class A(float):\n        def __eq__(self, x): return True\n    return A()",
        {"blocked"},
    ),
    "type": ("def f():\n    return type('A', (float,), {'a': 1})()", {"blocked"}),
    "import": ("import os\n\ndef f():\n    os.fork()", {"blocked"}),
    "import from": ("def f():\n    from subprocess import run\n    return run('ls')", {"blocked"}),
    "relative import": ("from . import server\n\ndef f():\n    return 1", {"blocked"}),
    "submodule": ("import collections.abc\n\ndef f():\n    return 1", {"blocked"}),
    "a name left out": ("from functools import update_wrapper\n\ndef f():\n    return 1", {"blocked"}),
    "a module's module": ("import statistics\n\ndef f():\n    return statistics.sys.exit(0)", {"error"}),
    "open": ("def f():\n    return len(open('CANARY').read())", {"blocked"}),
    "eval": ("def f():\n    return eval('1')", {"blocked"}),
    "getattr": ("def f():\n    return getattr(1, 're' + 'al')", {"blocked"}),
    "input": ("def f():\n    return float(input())", {"blocked"}),
    "breakpoint": ("def f():\n    breakpoint()", {"blocked"}),
    "shadowed": ("def g():\n    open = 1\n\ndef f():\n    return open('CANARY', 'w')", {"error"}),
    "__import__": ("def f():\n    return __import__('os').getpid()", {"blocked"}),
    "__builtins__": ("def f():\n    return __builtins__['open']('CANARY')", {"blocked"}),
    "subclasses": ("def f():\n    return len(().__class__.__base__.__subclasses__())", {"blocked"}),
    "globals of a module": ("from statistics import mean\n\ndef f():\n    return mean.__globals__['sys']", {"blocked"}),
    "format": ("def f():\n    return '{0.__class__}'.format(1)", {"blocked"}),
    "nested format": ("def f():\n    return '{:{0.real}}'.format(1)", {"blocked"}),
    "format of a variable": ("def f():\n    x = '{0.' + '__class__}'\n    return x.format(1)", {"blocked"}),
    "format as a function": ("def f():\n    return str.format('{0.' + '__class__}', 1)", {"blocked"}),
    "format_map": ("def f():\n    return '{x.real}'.format_map({'x': 1})", {"blocked"}),
    "f-string": ("def f():\n    return f'{().__class__}'", {"blocked"}),
    "generator frame": ("def f():\n    g = (x for x in [1])\n    return g.gi_frame.f_globals", {"blocked"}),
    "traceback frame": (
        "def f():\n    try:\n        1 / 0\n    except Exception as e:\n        return e.__traceback__.tb_frame",
        {"blocked"},
    ),
    "class pattern": ("def f():\n    match 1:\n        case int(__class__=c):\n            return c", {"blocked"}),
    "keyword": ("def f():\n    return dict(__class__=1)", {"blocked"}),
    "global": ("def f():\n    global __builtins__\n    return 1", {"blocked"}),
    "decorator": ("@eval\ndef f():\n    return 1", {"blocked"}),
    "wide letters": ("def f():\n    return ().＿＿class＿＿", {"blocked", "syntax"}),
    "async": ("def f():\n    async def g():\n        pass\n    return g().cr_frame", {"blocked"}),
}
"""With all layers: each with the reasons that may be given."""

UNCHECKED = {
    "read home": "import os\ndef f():\n    return len(os.listdir(os.path.expanduser('~root')))",
    "read passwords": "def f():\n    return len(open('/etc/passwd').read())",
    "read the environment": "import os\ndef f():\n    os.environ['PATH']\n    return 1",
    "read the parent's environment": (
        "import os\ndef f():\n    return len(open(f'/proc/{os.getppid()}/environ').read())"
    ),
    "read canary": "def f():\n    return len(open('CANARY').read())",
    "write canary": "def f():\n    open('CANARY', 'w').write('x')\n    return 1",
    "append to canary": "import os\ndef f():\n    return os.write(os.open('CANARY', os.O_APPEND | os.O_WRONLY), b'x')",
    "new file": "def f():\n    open('CANARY.new', 'w').write('x')\n    return 1",
    "new folder": "import os\ndef f():\n    os.mkdir('CANARY.folder')\n    return 1",
    "link": "import os\ndef f():\n    os.link('CANARY', 'CANARY.link')\n    return 1",
    "delete": "import os\ndef f():\n    os.remove('CANARY')\n    return 1",
    "rename": "import os\ndef f():\n    os.rename('CANARY', 'CANARY.gone')\n    return 1",
    "chmod": "import os\ndef f():\n    os.chmod('CANARY', 0)\n    return 1",
    "shell": "import os\ndef f():\n    assert os.system('echo x > CANARY.shell') == 0\n    return 1",
    "fork": "import os\ndef f():\n    os.fork()\n    return 1",
    "fork bomb": (
        "import os\ndef f():\n    while True:\n        try:\n            os.fork()\n"
        "        except OSError:\n            pass"
    ),
    "daemon": (
        "import os, time\ndef f():\n    if os.fork() == 0:\n        os.setsid()\n        if os.fork() == 0:\n"
        "            time.sleep(60)\n            open('CANARY.daemon', 'w')\n    time.sleep(60)"
    ),
    "thread": "import _thread, time\ndef f():\n    _thread.start_new_thread(time.sleep, (60,))\n    return 1",
    "socket": "import _socket\ndef f():\n    _socket.socket().connect(('127.0.0.1', 9))\n    return 1",
    "become root": "import os\ndef f():\n    os.setuid(0)\n    return 1 / (os.getuid() == 0)",
    "raise a limit": (
        "import resource\ndef f():\n    resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))\n    return 1"
    ),
}
"""Without the check: should the harm be done, each returns a number."""

UNRULY = {
    "kill the parent": "import os\ndef f():\n    os.kill(os.getppid(), 9)\n    return 1",
    "kill the session": "import os\ndef f():\n    os.killpg(os.getpgid(os.getppid()), 9)\n    return 1",
    "stop the parent": "import os\ndef f():\n    os.kill(os.getppid(), 19)\n    return 1",
    "kill itself": "import os\ndef f():\n    os.kill(os.getpid(), 9)\n    return 1",
    "abort": "import os\ndef f():\n    os.abort()",
    "segmentation fault": "import ctypes\ndef f():\n    ctypes.string_at(8)",
    "exit": "import os\ndef f():\n    os._exit(0)",
    "ignored signals": (
        "import signal\ndef f():\n    for s in (signal.SIGTERM, signal.SIGALRM, signal.SIGXCPU, signal.SIGINT):\n"
        "        signal.signal(s, signal.SIG_IGN)\n    while True:\n        pass"
    ),
    "closed descriptors": "import os\ndef f():\n    os.closerange(0, 4096)\n    while True:\n        pass",
    "closed descriptors and a result": "import os\ndef f():\n    os.closerange(0, 4096)\n    return 1",
    "no result": (
        "import os\ndef f():\n"
        '    os.write(10, b\'[]\\n{"reason": "ran", "value": [1], "output": 3}\\n\')\n    os._exit(0)'
    ),
    "nested result": "import os\ndef f():\n    os.write(10, b'[' * 9000)\n    os._exit(0)",
    "flooded pipe": "import os\ndef f():\n    while True:\n        os.write(10, b'x' * 65536)",
    "lying number": (
        "class A(float):\n    __class__ = float\n    def __eq__(self, x): return True\n    __hash__ = None\n"
        "    def __float__(self): return 18.0\n    def __repr__(self): return '18.0'\n\ndef f():\n    return A()"
    ),
    "lying name": "class M(type):\n    __name__ = 1 / 1\n\nclass A(metaclass=M): pass\n\ndef f():\n    return A()",
    "lying error": (
        "class E(Exception):\n    def __str__(self):\n        while True:\n            raise self\n\n"
        "def f():\n    raise E"
    ),
    "printing": (
        "import sys, os\ndef f():\n    while True:\n        os.write(1, b'x' * 65536)\n        print('x' * 65536)"
    ),
    "broken tools": (
        "import json, os\ndef f():\n    json.dumps = lambda x: 'x'\n    json.JSONEncoder = None\n    return 1"
    ),
}
"""Without the check: none may harm us, or the next program, whatever comes of it itself."""
