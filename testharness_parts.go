package raft

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"example.com/raft/internal/memnet"
	"example.com/raft/internal/vfs"
)

// This file is what a Harness is made of: its two networks, its disks, the
// wrapper around the user's state machine, and its log.

// harnessNet connects the nodes of a harness, which have the addresses
// harnessAddr(i) on it. stall and delay return false where they are missing.
type harnessNet interface {
	listen(i int) (net.Listener, error)
	dialer(i int) func(ctx context.Context, network, addr string) (net.Conn, error)
	connect(i, j int, up bool)
	stall(i, j int, on bool) bool
	delay(floor, ceiling time.Duration) bool
	grow(n int)     // makes room for n nodes
	reset(i, j int) // the connections between i and j
	close() int     // returns what nodes left open
}

// verdictFunc decides about one write from a node to another.
type verdictFunc func(from, to int, p []byte) memnet.Verdict

func harnessHost(i int) string { return "node" + strconv.Itoa(i) }
func harnessAddr(i int) string { return harnessHost(i) + ":1" }

// memNet is the network in memory.
type memNet struct {
	net     *memnet.Network
	n       int
	verdict verdictFunc
}

func newMemNet(n int, seed uint64, verdict verdictFunc) *memNet {
	m := &memNet{net: memnet.New(seed), verdict: verdict}
	m.grow(n)
	return m
}

// grow makes room for n nodes.
func (m *memNet) grow(n int) {
	m.n = n
	m.pairs(func(i, j int) {
		m.net.SetFilter(harnessHost(i), harnessHost(j), func(p []byte) memnet.Verdict { return m.verdict(i, j, p) })
	})
}

// pairs calls f for each direction between two nodes.
func (m *memNet) pairs(f func(i, j int)) {
	for i := range m.n {
		for j := range m.n {
			if i != j {
				f(i, j)
			}
		}
	}
}

func (m *memNet) listen(i int) (net.Listener, error) { return m.net.Listen(harnessAddr(i)) }

func (m *memNet) dialer(i int) func(context.Context, string, string) (net.Conn, error) {
	return m.net.Dialer(harnessHost(i))
}

func (m *memNet) connect(i, j int, up bool) {
	if up {
		m.net.Join(harnessHost(i), harnessHost(j))
	} else {
		m.net.Cut(harnessHost(i), harnessHost(j))
	}
}

func (m *memNet) stall(i, j int, on bool) bool {
	set := m.net.Unstall
	if on {
		set = m.net.Stall
	}
	set(harnessHost(i), harnessHost(j))
	set(harnessHost(j), harnessHost(i))
	return true
}

func (m *memNet) delay(floor, ceiling time.Duration) bool {
	f := memnet.HeavyTail(floor, ceiling)
	switch {
	case ceiling <= 0:
		f = nil
	case floor >= ceiling:
		f = memnet.Constant(ceiling)
	}
	m.pairs(func(i, j int) { m.net.SetDelay(harnessHost(i), harnessHost(j), f) })
	return true
}

func (m *memNet) reset(i, j int) { m.net.Break(harnessHost(i), harnessHost(j)) }

func (m *memNet) close() int {
	open := m.net.Open()
	m.net.Close()
	return open
}

// tcpNet is TCP on the loopback interface. A node keeps its address on this
// network while its port is another one after each start. Faults act on the
// dialling end of a connection, so verdicts are asked about calls, not replies.
type tcpNet struct {
	verdict verdictFunc

	mu        sync.Mutex
	ports     map[string]string // harnessAddr to host:port; missing while nobody listens
	down      map[[2]int]bool   // by ascending nodes
	conns     map[*tcpConn]bool
	listeners int
}

func newTCPNet(verdict verdictFunc) *tcpNet {
	return &tcpNet{verdict: verdict, ports: map[string]string{}, down: map[[2]int]bool{}, conns: map[*tcpConn]bool{}}
}

func pairOf(i, j int) [2]int { return [2]int{min(i, j), max(i, j)} }

func (n *tcpNet) listen(i int) (net.Listener, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.ports[harnessAddr(i)] = l.Addr().String()
	n.listeners++
	return &tcpListener{Listener: l, net: n, node: i}, nil
}

type tcpListener struct {
	net.Listener
	net  *tcpNet
	node int
	once sync.Once
}

func (l *tcpListener) Close() error {
	l.once.Do(func() {
		l.net.mu.Lock()
		defer l.net.mu.Unlock()
		delete(l.net.ports, harnessAddr(l.node))
		l.net.listeners--
	})
	return l.Listener.Close()
}

func (n *tcpNet) dialer(i int) func(context.Context, string, string) (net.Conn, error) {
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		host, _, _ := net.SplitHostPort(addr)
		j, err := strconv.Atoi(strings.TrimPrefix(host, "node"))
		if err != nil {
			return nil, fmt.Errorf("dial %s: no node has this address", addr)
		}
		n.mu.Lock()
		port, down := n.ports[addr], n.down[pairOf(i, j)]
		n.mu.Unlock()
		switch {
		case down:
			return nil, &net.OpError{Op: "dial", Net: network, Err: os.NewSyscallError("connect", syscall.EHOSTUNREACH)}
		case port == "":
			return nil, &net.OpError{Op: "dial", Net: network, Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}
		}
		raw, err := (&net.Dialer{}).DialContext(ctx, "tcp", port)
		if err != nil {
			return nil, err
		}
		c := &tcpConn{Conn: raw, net: n, from: i, to: j}
		n.mu.Lock()
		defer n.mu.Unlock()
		if n.down[pairOf(i, j)] { // cut meanwhile
			raw.Close()
			return nil, &net.OpError{Op: "dial", Net: network, Err: os.NewSyscallError("connect", syscall.EHOSTUNREACH)}
		}
		n.conns[c] = true
		return c, nil
	}
}

func (n *tcpNet) connect(i, j int, up bool) {
	n.mu.Lock()
	n.down[pairOf(i, j)] = !up
	n.mu.Unlock()
	if !up {
		n.reset(i, j)
	}
}

func (n *tcpNet) reset(i, j int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for c := range n.conns {
		if pairOf(c.from, c.to) == pairOf(i, j) {
			c.Conn.Close() // its owner closes the rest
		}
	}
}

func (n *tcpNet) grow(int)                                {}
func (n *tcpNet) stall(int, int, bool) bool               { return false }
func (n *tcpNet) delay(time.Duration, time.Duration) bool { return false }

func (n *tcpNet) close() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.conns) + n.listeners
}

// tcpConn is the dialling end of a connection.
type tcpConn struct {
	net.Conn
	net      *tcpNet
	from, to int

	mu    sync.Mutex // guards lossy; not held while writing
	lossy bool       // swallows everything written
}

func (c *tcpConn) Write(p []byte) (int, error) {
	c.mu.Lock()
	lossy := c.lossy
	c.mu.Unlock()
	if lossy {
		return len(p), nil
	}
	switch c.net.verdict(c.from, c.to, p) {
	case memnet.Drop:
		c.mu.Lock()
		c.lossy = true
		c.mu.Unlock()
		return len(p), nil
	case memnet.Break:
		c.Conn.Close()
	}
	return c.Conn.Write(p)
}

func (c *tcpConn) Close() error {
	c.net.mu.Lock()
	delete(c.net.conns, c)
	c.net.mu.Unlock()
	return c.Conn.Close()
}

// countCalls returns how many requests a write holds.
func countCalls(p []byte) (n int) {
	for len(p) >= frameHeaderBytes && string(p[:2]) == frameMagic {
		if frameKind(p[3]) == frameRequest {
			n++
		}
		length := frameHeaderBytes + int(binary.LittleEndian.Uint32(p[8:]))
		p = p[min(len(p), length):]
	}
	return n
}

// harnessDisk is the disk of one node through all its restarts. Each start
// sees it through a bootFS of its own.
type harnessDisk struct {
	fs  vfs.FS
	mem *vfs.Mem // fs, unless the disk is a real directory
	dir string

	mu    sync.Mutex
	delay time.Duration // of each sync
	boot  *bootFS       // of the newest start; nil before
}

func (h *Harness) newDisk(i int) *harnessDisk {
	if h.options.dir != "" {
		return &harnessDisk{fs: vfs.OS(), dir: filepath.Join(h.options.dir, strconv.Itoa(i))}
	}
	mem := vfs.NewMem(rand.New(rand.NewPCG(h.options.seed, uint64(i)+1)))
	return &harnessDisk{fs: mem, mem: mem, dir: "data"}
}

// storage returns the storage of one start.
func (d *harnessDisk) storage(c Config) Storage {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.boot = &bootFS{FS: d.fs, disk: d, over: make(chan struct{})}
	c = c.withDefaults()
	s := newDiskStorage(&c)
	s.fs, s.dir = d.boot, d.dir
	return s
}

func (d *harnessDisk) slow(delay time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.delay = delay
}

// crash ends the newest start: it can change nothing any more.
func (d *harnessDisk) crash(dice *rand.Rand) {
	d.hurry()
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.boot != nil {
		d.boot.mu.Lock()
		d.boot.dead = true
		d.boot.mu.Unlock()
	}
	if d.mem != nil {
		d.mem.Crash(dice.IntN)
	}
}

// hurry ends the waits of slow syncs, now and later in this start.
func (d *harnessDisk) hurry() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.boot != nil && !isClosed(d.boot.over) {
		close(d.boot.over)
	}
}

// openFiles returns how many files and locks the newest start has open.
func (d *harnessDisk) openFiles() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.boot == nil {
		return 0
	}
	d.boot.mu.Lock()
	defer d.boot.mu.Unlock()
	return d.boot.open
}

// bootFS is a disk as one start of a node sees it: when the node crashes,
// nothing gets through any more.
type bootFS struct {
	vfs.FS
	disk *harnessDisk
	over chan struct{} // closed when slow syncs should wait no longer

	mu   sync.Mutex
	dead bool
	open int
}

func (b *bootFS) alive() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.dead {
		return vfs.ErrGone
	}
	return nil
}

func (b *bootFS) opened(n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.open += n
}

func (b *bootFS) file(f vfs.File, err error) (vfs.File, error) {
	if err != nil {
		return nil, err
	}
	b.opened(1)
	return &bootFile{File: f, boot: b}, nil
}

func (b *bootFS) Create(name string) (vfs.File, error) {
	if err := b.alive(); err != nil {
		return nil, err
	}
	return b.file(b.FS.Create(name))
}

func (b *bootFS) Open(name string) (vfs.File, error) {
	if err := b.alive(); err != nil {
		return nil, err
	}
	return b.file(b.FS.Open(name))
}

func (b *bootFS) Remove(name string) error {
	if err := b.alive(); err != nil {
		return err
	}
	return b.FS.Remove(name)
}

func (b *bootFS) Rename(oldname, newname string) error {
	if err := b.alive(); err != nil {
		return err
	}
	return b.FS.Rename(oldname, newname)
}

func (b *bootFS) MkdirAll(dir string) error {
	if err := b.alive(); err != nil {
		return err
	}
	return b.FS.MkdirAll(dir)
}

func (b *bootFS) SyncDir(dir string) error {
	if err := b.alive(); err != nil {
		return err
	}
	return b.FS.SyncDir(dir)
}

func (b *bootFS) Lock(name string) (io.Closer, error) {
	l, err := b.FS.Lock(name)
	if err != nil {
		return nil, err
	}
	b.opened(1)
	return &bootLock{Closer: l, boot: b}, nil
}

type bootLock struct {
	io.Closer
	boot *bootFS
	once sync.Once
}

func (l *bootLock) Close() error {
	l.once.Do(func() { l.boot.opened(-1) })
	return l.Closer.Close()
}

type bootFile struct {
	vfs.File
	boot *bootFS
	once sync.Once
}

func (f *bootFile) WriteAt(p []byte, off int64) (int, error) {
	if err := f.boot.alive(); err != nil {
		return 0, err
	}
	return f.File.WriteAt(p, off)
}

func (f *bootFile) Truncate(size int64) error {
	if err := f.boot.alive(); err != nil {
		return err
	}
	return f.File.Truncate(size)
}

func (f *bootFile) Sync() error {
	d := f.boot.disk
	d.mu.Lock()
	delay := d.delay
	d.mu.Unlock()
	if delay > 0 {
		t := time.NewTimer(delay)
		defer t.Stop()
		select {
		case <-t.C:
		case <-f.boot.over:
		}
	}
	if err := f.boot.alive(); err != nil {
		return err
	}
	return f.File.Sync()
}

func (f *bootFile) Close() error {
	f.once.Do(func() { f.boot.opened(-1) })
	return f.File.Close()
}

// harnessMachine stands before the user's state machine for one start of a
// node, and remembers what was applied.
type harnessMachine struct {
	h     *Harness
	node  int
	user  StateMachine
	batch BatchApplier  // user, if it is one
	turn  chan struct{} // holds one token while an Apply or a read runs

	mu   sync.Mutex
	at   map[string]Index // where a command was applied first
	last Index
}

// echo is the state machine of a harness that was given none.
type echo struct{}

func (echo) Apply(e Entry) []byte { return e.Data }

func (echo) Snapshot() (Capture, error) {
	return CaptureFunc(func(context.Context, io.Writer) error { return nil }), nil
}

func (echo) Restore(io.Reader) error { return nil }

func (h *Harness) newMachine(i int) *harnessMachine {
	var user StateMachine = echo{}
	if h.options.machine != nil {
		user = h.options.machine(i)
	}
	batch, _ := user.(BatchApplier)
	return &harnessMachine{h: h, node: i, user: user, batch: batch, turn: make(chan struct{}, 1), at: map[string]Index{}}
}

// shape returns m with the methods that the user's machine has.
func (m *harnessMachine) shape() StateMachine {
	if d, ok := m.user.(OnDisk); ok {
		return harnessDiskMachine{m, d}
	}
	if m.batch != nil {
		return harnessBatchMachine{m}
	}
	return m
}

func (m *harnessMachine) Apply(e Entry) []byte {
	m.turn <- struct{}{}
	defer func() { <-m.turn }()
	r := m.user.Apply(e)
	m.record(e)
	return r
}

// harnessDiskMachine is the shape of a machine that keeps its state on disk.
type harnessDiskMachine struct {
	*harnessMachine
	disk OnDisk
}

func (m harnessDiskMachine) LoadMeta(each func(key, value []byte) error) error {
	return m.disk.LoadMeta(func(key, value []byte) error {
		if last, ok := includedUpTo(key, value); ok {
			m.includes(last)
		}
		return each(key, value)
	})
}

func (m harnessDiskMachine) ApplyOnDisk(entries []Entry, results [][]byte, meta func() []MetaChange) error {
	m.turn <- struct{}{}
	defer func() { <-m.turn }()
	err := m.disk.ApplyOnDisk(entries, results, meta)
	if err == nil {
		for _, e := range entries {
			m.record(e)
		}
	}
	return err
}

func (m harnessDiskMachine) RestoreOnDisk(r io.Reader, meta []MetaChange) error {
	return m.restore(r, func(r io.Reader) error { return m.disk.RestoreOnDisk(r, meta) })
}

// includes notes that the machine has what was applied up to entry last,
// wherever that was.
func (m *harnessMachine) includes(last Index) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.last, m.at = last, map[string]Index{}
	m.h.mu.Lock()
	defer m.h.mu.Unlock()
	for i, e := range m.h.applied {
		if at, known := m.at[string(e.Data)]; i <= last && (!known || i < at) {
			m.at[string(e.Data)] = i
		}
	}
}

// Snapshot captures the user's machine. What is written begins with the last
// applied index, so that Restore knows what the state includes.
func (m *harnessMachine) Snapshot() (Capture, error) {
	m.turn <- struct{}{}
	defer func() { <-m.turn }()
	c, err := m.user.Snapshot()
	if err != nil || c == nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return &harnessCapture{c, m.last}, nil
}

type harnessCapture struct {
	Capture
	last Index
}

func (c *harnessCapture) WriteTo(ctx context.Context, w io.Writer) error {
	if _, err := w.Write(binary.LittleEndian.AppendUint64(nil, uint64(c.last))); err != nil {
		return err
	}
	return c.Capture.WriteTo(ctx, w)
}

func (m *harnessMachine) Restore(r io.Reader) error { return m.restore(r, m.user.Restore) }

func (m *harnessMachine) restore(r io.Reader, call func(io.Reader) error) error {
	var last [8]byte
	if _, err := io.ReadFull(r, last[:]); err != nil {
		return err
	}
	m.turn <- struct{}{}
	defer func() { <-m.turn }()
	if err := call(r); err != nil {
		return err
	}
	m.includes(Index(binary.LittleEndian.Uint64(last[:])))
	return nil
}

type harnessBatchMachine struct{ *harnessMachine }

func (m harnessBatchMachine) ApplyBatch(entries []Entry, results [][]byte) {
	m.turn <- struct{}{}
	defer func() { <-m.turn }()
	m.batch.ApplyBatch(entries, results)
	for _, e := range entries {
		m.record(e)
	}
}

// record notes an entry and compares it with what other nodes, and earlier
// starts of this one, have applied at its index (State Machine Safety, §5.4.3).
func (m *harnessMachine) record(e Entry) {
	m.mu.Lock()
	if e.Index <= m.last {
		m.h.t.Errorf("node %d applied entry %d after entry %d", m.node, e.Index, m.last)
	}
	m.last = e.Index
	if _, known := m.at[string(e.Data)]; !known {
		m.at[string(e.Data)] = e.Index
	}
	m.mu.Unlock()
	m.h.mu.Lock()
	defer m.h.mu.Unlock()
	old, known := m.h.applied[e.Index]
	if !known {
		m.h.applied[e.Index] = e
	} else if old.Term != e.Term || !old.Time.Equal(e.Time) || !bytes.Equal(old.Data, e.Data) {
		m.h.t.Errorf("node %d applied %.40q of term %d at index %d, where %.40q of term %d was applied before",
			m.node, e.Data, e.Term, e.Index, old.Data, old.Term)
	}
}

func (m *harnessMachine) find(cmd []byte) (Index, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	i, ok := m.at[string(cmd)]
	return i, ok
}

func (m *harnessMachine) read(f func(StateMachine) []byte) []byte {
	m.turn <- struct{}{}
	defer func() { <-m.turn }()
	result := f(m.user)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.h.history.read(historyRead{m.node, m.last, f, bytes.Clone(result)})
	return result
}

// harnessLog writes one line per event to the test's output.
type harnessLog struct {
	mu     sync.Mutex
	t      TB
	w      io.Writer // nil: t.Logf
	closed bool      // the test may be over
}

func newHarnessLog(t TB) *harnessLog {
	l := &harnessLog{t: t}
	if o, ok := t.(interface{ Output() io.Writer }); ok {
		l.w = o.Output()
	}
	return l
}

func (l *harnessLog) line(who, message string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return
	}
	line := fmt.Sprintf("%s [%s] %s", time.Now().Format("15:04:05.000000"), who, message)
	if l.w == nil {
		l.t.Logf("%s", line)
		return
	}
	io.WriteString(l.w, line+"\n")
}

func (l *harnessLog) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
}

func (l *harnessLog) logger(node string) *slog.Logger {
	return slog.New(&harnessHandler{log: l, node: node})
}

// harnessHandler writes what one node logs.
type harnessHandler struct {
	log   *harnessLog
	node  string
	attrs string
}

func (*harnessHandler) Enabled(context.Context, slog.Level) bool { return true }

func (h *harnessHandler) Handle(_ context.Context, r slog.Record) error {
	b := h.attrs
	r.Attrs(func(a slog.Attr) bool {
		if a.Key != "node" { // the line begins with it
			b += " " + a.String()
		}
		return true
	})
	h.log.line(h.node, r.Message+b)
	return nil
}

func (h *harnessHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	c := *h
	for _, a := range attrs {
		c.attrs += " " + a.String()
	}
	return &c
}

func (h *harnessHandler) WithGroup(string) slog.Handler { return h }
