package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"time"

	"example.com/raft"
	"example.com/raft/bench/cluster"
)

// The timing at which others were measured.
const (
	heartbeat = 50 * time.Millisecond
	election  = 150 * time.Millisecond // deadlines are drawn from [150 ms, 300 ms)
)

// steady is for how long the client writes before the leader is stopped, and
// patience how long a run may take at most.
const (
	steady   = 300 * time.Millisecond
	patience = 30 * time.Second
)

func timing(c *raft.Config) { c.HeartbeatInterval, c.ElectionTimeout = heartbeat, election }

// runSilent stops the leader by stalling all of its connections: they stay open
// and carry nothing, in neither direction.
func runSilent(ctx context.Context, o options) (took time.Duration, err error) {
	dir, remove, err := cluster.TempDir(o.dir)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, remove()) }()
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	stalls := make([]*stall, cluster.Size)
	c, err := cluster.Start(ctx, dir, func(i int, c *raft.Config) {
		timing(c)
		stalls[i] = newStall()
		c.Listener = stallListener{c.Listener, stalls[i]}
		c.DialContext = stalls[i].dial
	})
	if err != nil {
		return 0, err
	}
	defer func() {
		for _, s := range stalls {
			s.end() // nobody waits in a stalled connection any more
		}
		err = errors.Join(err, c.Stop())
	}()
	leader, err := c.Leader(ctx)
	if err != nil {
		return 0, err
	}
	leadership, err := before(ctx, c.Servers[leader], o)
	if err != nil {
		return 0, err
	}
	rest := &cluster.Cluster{}
	for i, s := range c.Servers {
		if i != leader {
			rest.Servers = append(rest.Servers, s)
		}
	}
	if leadership.Err() != nil {
		return 0, errMoved
	}
	began := time.Now()
	stalls[leader].begin()
	next, err := rest.Leader(ctx)
	if err == nil {
		_, err = rest.Servers[next].Propose(ctx, []byte("after"))
	}
	return time.Since(began), err
}

// errMoved ends a run in which the leader was not the leader any more when it
// was to be stopped. It does not count.
var errMoved = errors.New("leadership moved before the leader was stopped")

// before is what precedes the stop: the client writes on the leader in a closed
// loop, or, if nobody is to write, waits until some moment between two
// heartbeats. The context that it returns ends with the leadership.
func before(ctx context.Context, s *raft.Server, o options) (context.Context, error) {
	leadership, _, err := s.WaitLeadership(ctx)
	if err != nil {
		return nil, err
	}
	if o.idle {
		select {
		case <-time.After(steady + rand.N(heartbeat)):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		return leadership, nil
	}
	for until := time.Now().Add(steady); time.Now().Before(until); {
		if _, err := s.Propose(ctx, []byte("before")); err != nil {
			return nil, fmt.Errorf("before the leader was stopped: %w", err)
		}
	}
	return leadership, nil
}

// stall is a switch for all connections of a node.
type stall struct {
	begun chan struct{} // closed when nothing may pass any more
	ended chan struct{}
	once  sync.Once
}

func newStall() *stall { return &stall{begun: make(chan struct{}), ended: make(chan struct{})} }

func (s *stall) begin() { close(s.begun) }
func (s *stall) end()   { s.once.Do(func() { close(s.ended) }) }

func (s *stall) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	select {
	case <-s.begun: // nobody answers
		select {
		case <-ctx.Done():
		case <-s.ended:
		}
		return nil, errors.New("the node is silent")
	default:
	}
	conn, err := (&net.Dialer{}).DialContext(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	return newStallConn(conn, s), nil
}

type stallListener struct {
	net.Listener
	stall *stall
}

func (l stallListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return newStallConn(conn, l.stall), nil
}

// stallConn reads and writes until its node is silent; then both wait for the
// connection to be closed by this node, and what was on its way in is lost.
type stallConn struct {
	net.Conn
	stall  *stall
	closed chan struct{}
	once   sync.Once
}

func newStallConn(c net.Conn, s *stall) *stallConn {
	return &stallConn{Conn: c, stall: s, closed: make(chan struct{})}
}

// pass waits for ever, or until the connection is closed, if the node is silent.
func (c *stallConn) pass() error {
	select {
	case <-c.stall.begun:
	default:
		return nil
	}
	select {
	case <-c.closed:
	case <-c.stall.ended:
	}
	return net.ErrClosed
}

func (c *stallConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if stalled := c.pass(); stalled != nil {
		return 0, stalled
	}
	return n, err
}

func (c *stallConn) Write(b []byte) (int, error) {
	if err := c.pass(); err != nil {
		return 0, err
	}
	return c.Conn.Write(b)
}

// Close does not reach the other side while the node is silent: it would be a
// sign of life.
func (c *stallConn) Close() error {
	c.once.Do(func() { close(c.closed) })
	select {
	case <-c.stall.begun:
		select {
		case <-c.stall.ended:
		default:
			return c.Conn.SetDeadline(time.Unix(1, 0))
		}
	default:
	}
	return c.Conn.Close()
}

// child runs one node until its standard input ends, and writes when it is told.
// Standard output says what became of it.
func child(ctx context.Context, o options, in io.Reader, out io.Writer) error {
	var members []raft.Member
	var conf raft.Config
	for f := range strings.SplitSeq(o.members, ",") {
		id, addr, _ := strings.Cut(f, "=")
		members = append(members, raft.Member{ID: raft.NodeID(id), Addr: addr})
	}
	conf = cluster.Config(o.dir, raft.NodeID(o.node), members, &cluster.Machine{})
	timing(&conf)
	s, err := raft.Start(ctx, conf)
	if err != nil {
		return err
	}
	lines := bufio.NewScanner(in)
	for lines.Scan() && err == nil {
		switch lines.Text() {
		case "lead?":
			leads := s.Status().Role == raft.Leader
			if leads {
				_, _, err = s.WaitLeadership(ctx)
			}
			fmt.Fprintln(out, leads)
		case "prepare":
			var leadership context.Context
			leadership, err = before(ctx, s, o)
			fmt.Fprintln(out, err == nil && leadership.Err() == nil)
		case "write when you lead":
			if _, _, err = s.WaitLeadership(ctx); err == nil {
				_, err = s.Propose(ctx, []byte("after"))
			}
			fmt.Fprintln(out, err == nil)
		}
	}
	return errors.Join(err, s.Close())
}

// process is a node in a process of its own.
type process struct {
	cmd     *exec.Cmd
	stdin   io.WriteCloser
	answers *bufio.Reader
	killed  bool
}

// spawn starts a node as this command with other arguments.
func spawn(ctx context.Context, dir, id, members string, o options) (*process, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, self, "-dir", dir, "-node", id, "-members", members, "-procs", strconv.Itoa(o.procs), "-idle="+strconv.FormatBool(o.idle))
	cmd.Stderr = os.Stderr
	cmd.Env = append(os.Environ(), childVariable+"=1")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	return &process{cmd: cmd, stdin: stdin, answers: bufio.NewReader(stdout)}, nil
}

// childVariable tells the test binary that it is to be the command.
const childVariable = "RAFT_BENCH_FAILOVER_NODE"

// ask has a node do something and returns what it says.
func (p *process) ask(what string) (bool, error) {
	if _, err := fmt.Fprintln(p.stdin, what); err != nil {
		return false, err
	}
	line, err := p.answers.ReadString('\n')
	if err != nil {
		return false, fmt.Errorf("a node was told %q and ended: %w", what, err)
	}
	return strings.TrimSpace(line) == "true", nil
}

func (p *process) kill() error {
	p.killed = true
	return p.cmd.Process.Kill()
}

func (p *process) stop() error {
	p.stdin.Close()
	err := p.cmd.Wait()
	if p.killed {
		return nil
	}
	return err
}

// runDead kills the leader's process.
func runDead(ctx context.Context, o options) (took time.Duration, err error) {
	dir, remove, err := cluster.TempDir(o.dir)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, remove()) }()
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	members, ids, err := freeMembers()
	if err != nil {
		return 0, err
	}
	var nodes []*process
	defer func() {
		for _, p := range nodes {
			err = errors.Join(err, p.stop())
		}
	}()
	for _, id := range ids {
		p, err := spawn(ctx, dir, id, members, o)
		if err != nil {
			return 0, err
		}
		nodes = append(nodes, p)
	}
	leader, err := findLeader(ctx, nodes)
	if err != nil {
		return 0, err
	}
	switch ok, err := nodes[leader].ask("prepare"); {
	case err != nil:
		return 0, err
	case !ok:
		return 0, errMoved
	}
	began := time.Now()
	if err := nodes[leader].kill(); err != nil {
		return 0, err
	}
	type answer struct {
		ok  bool
		err error
	}
	answers := make(chan answer, len(nodes)) // the one that does not lead ends without one
	for i, p := range nodes {
		if i != leader {
			go func() {
				ok, err := p.ask("write when you lead")
				answers <- answer{ok, err}
			}()
		}
	}
	a := <-answers
	took = time.Since(began)
	if a.err == nil && !a.ok {
		a.err = errors.New("the new leader committed nothing")
	}
	for i, p := range nodes {
		if i != leader {
			a.err = errors.Join(a.err, p.kill())
		}
	}
	<-answers
	return took, a.err
}

func findLeader(ctx context.Context, nodes []*process) (int, error) {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		for i, p := range nodes {
			if leads, err := p.ask("lead?"); err != nil || leads {
				return i, err
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return 0, fmt.Errorf("no node leads: %w", ctx.Err())
		}
	}
}

// freeMembers returns three addresses that are free, in the form that child takes.
func freeMembers() (members string, ids []string, err error) {
	listeners, ms, err := cluster.Listen()
	if err != nil {
		return "", nil, err
	}
	var fields []string
	for i, l := range listeners {
		l.Close()
		fields = append(fields, string(ms[i].ID)+"="+ms[i].Addr)
		ids = append(ids, string(ms[i].ID))
	}
	return strings.Join(fields, ","), ids, nil
}
