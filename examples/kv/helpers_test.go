package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/fortytw2/leaktest"
)

const patience = 20 * time.Second // until a test gives up waiting

// checkLeaks fails the test if goroutines are left at its end.
func checkLeaks(t *testing.T) {
	t.Cleanup(leaktest.CheckTimeout(t, 5*time.Second))
}

// eventually waits until ok returns true.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("waited %v in vain: %s", patience, what)
		}
	}
}

// freePorts returns the first of n consecutive ports that are free. They are
// below those that the system gives to outgoing connections, which could
// otherwise take the port of a stopped node.
func freePorts(t *testing.T, n int) int {
	t.Helper()
	for range 100 {
		first := 20000 + rand.IntN(12000)
		if allFree(first, n) {
			return first
		}
	}
	t.Fatal("found no free ports")
	return 0
}

func allFree(first, n int) bool {
	for i := range n {
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", first+i))
		if err != nil {
			return false
		}
		l.Close()
	}
	return true
}

// client speaks HTTP and leaves no connection behind.
type client struct{ http.Client }

func newClient(t *testing.T) *client {
	c := &client{http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 32}, Timeout: patience}}
	t.Cleanup(c.CloseIdleConnections)
	return c
}

// reply is an answer, read whole.
type reply struct {
	code   int
	header http.Header
	body   string
}

func (r reply) version() string { return r.header.Get("ETag") }

// try sends a request. headers are "Name: value".
func (c *client) try(method, url, body string, headers ...string) (reply, error) {
	req, err := http.NewRequest(method, url, strings.NewReader(body))
	if err != nil {
		return reply{}, err
	}
	for _, h := range headers {
		name, value, _ := strings.Cut(h, ": ")
		req.Header.Set(name, value)
	}
	resp, err := c.Do(req)
	if err != nil {
		return reply{}, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return reply{resp.StatusCode, resp.Header, string(b)}, err
}

// must is try for a request that has to be answered with code.
func (c *client) must(t *testing.T, code int, method, url, body string, headers ...string) reply {
	t.Helper()
	r, err := c.try(method, url, body, headers...)
	if err != nil {
		t.Fatal(err)
	}
	if r.code != code {
		t.Fatalf("%s %s %v: %d %s, want %d", method, url, headers, r.code, r.body, code)
	}
	return r
}

func (c *client) status(base string) (s pageState, err error) {
	r, err := c.try("GET", base+"/status", "")
	if err != nil {
		return s, err
	}
	err = json.NewDecoder(bytes.NewReader([]byte(r.body))).Decode(&s)
	return s, err
}

// startCluster runs three nodes in this process until the test ends.
func startCluster(t *testing.T, dir string, ports int, timeout time.Duration) *Cluster {
	t.Helper()
	c, err := newCluster(dir, ports, false, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Stop() })
	for _, n := range c.Nodes() {
		n.Timeout = timeout
	}
	if err := c.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	return c
}

// leader waits for one.
func (c *Cluster) leader(t *testing.T) *Node {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	n, _, err := c.WaitLeader(ctx)
	if err != nil {
		t.Fatalf("no leader: %v", err)
	}
	return n
}

func (n *Node) url() string { return "http://" + n.HTTP }

// load is clients that write different keys, each waiting for its answer, and
// remember which writes were acknowledged.
type load struct {
	urls    []string
	client  *client
	stopped chan struct{}
	writers sync.WaitGroup

	mu    sync.Mutex
	acked map[string]string
	times []time.Time // of the acknowledgements
}

func startLoad(t *testing.T, urls ...string) *load {
	l := &load{urls: urls, client: newClient(t), stopped: make(chan struct{}), acked: map[string]string{}}
	for w := range 4 {
		l.writers.Go(func() { l.write(w) })
	}
	t.Cleanup(l.stop)
	return l
}

// write puts one key after another, and goes to another node when one fails.
func (l *load) write(writer int) {
	tick := time.NewTicker(3 * time.Millisecond)
	defer tick.Stop()
	node := writer
	for i := 0; ; i++ {
		select {
		case <-tick.C:
		case <-l.stopped:
			return
		}
		key, value := fmt.Sprintf("load/%d/%d", writer, i), fmt.Sprintf("value %d of %d", i, writer)
		r, err := l.client.try("PUT", l.urls[node%len(l.urls)]+"/kv/"+key, value)
		if err != nil || r.code != http.StatusCreated {
			node++
			continue
		}
		l.mu.Lock()
		l.acked[key] = value
		l.times = append(l.times, time.Now())
		l.mu.Unlock()
	}
}

func (l *load) stop() {
	select {
	case <-l.stopped:
	default:
		close(l.stopped)
	}
	l.writers.Wait()
}

// waitFor waits until n more writes are acknowledged.
func (l *load) waitFor(t *testing.T, n int) {
	t.Helper()
	count := func() int {
		l.mu.Lock()
		defer l.mu.Unlock()
		return len(l.acked)
	}
	want := count() + n
	eventually(t, fmt.Sprintf("%d more acknowledged writes", n), func() bool { return count() >= want })
}

// longestGap returns the longest time without an acknowledgement since then.
func (l *load) longestGap(since time.Time) (gap time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, at := range l.times {
		if at.After(since) {
			gap = max(gap, at.Sub(since))
			since = at
		}
	}
	return gap
}

// check reads every acknowledged key, from all nodes in turn.
func (l *load) check(t *testing.T, urls ...string) {
	t.Helper()
	keys := make(chan string)
	var readers sync.WaitGroup
	for range 16 {
		readers.Go(func() {
			for key := range keys {
				r, err := l.client.try("GET", urls[rand.IntN(len(urls))]+"/kv/"+key, "")
				if err != nil || r.code != http.StatusOK || r.body != l.acked[key] {
					t.Errorf("acknowledged key %s: %v, %d %q, want %q", key, err, r.code, r.body, l.acked[key])
				}
			}
		})
	}
	for key := range l.acked {
		keys <- key
	}
	close(keys)
	readers.Wait()
}
