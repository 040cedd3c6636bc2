package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const patience = 30 * time.Second // until a test gives up waiting

// cluster is the machines of docs/OPERATING.md: 10.0.0.K is a pair of ports of
// this one, /var/lib and the working directory are temporary.
type cluster struct {
	t         *testing.T
	home      string
	replace   *strings.Replacer
	processes map[string]*exec.Cmd
	commands  []string // of the document, those that were not run yet
}

func newCluster(t *testing.T) *cluster {
	c := &cluster{t: t, home: t.TempDir(), processes: map[string]*exec.Cmd{}}
	// Below those that the system gives to outgoing connections.
	first := 20000 + rand.IntN(12000)
	pairs := []string{"/var/lib", c.home, "orders.backup", filepath.Join(c.home, "orders.backup"), "b.json", filepath.Join(c.home, "b.json")}
	for k := range 3 {
		for i, port := range []int{7000, 8000} {
			l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", first+2*k+i))
			if err != nil {
				t.Skipf("no free ports: %v", err)
			}
			l.Close()
			pairs = append(pairs, fmt.Sprintf("10.0.0.%d:%d", k+1, port), l.Addr().String())
		}
	}
	c.replace = strings.NewReplacer(pairs...)
	b, err := os.ReadFile("../../docs/OPERATING.md")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if strings.HasPrefix(line, "operate ") || strings.HasPrefix(line, "curl ") {
			c.commands = append(c.commands, strings.TrimSpace(line))
		}
	}
	if out, err := exec.Command("go", "build", "-o", filepath.Join(c.home, "operate"), ".").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	t.Cleanup(c.killAll)
	return c
}

// document runs the next command of the document, which must be the one that is
// expected, and returns what it printed.
func (c *cluster) document(begins string) string {
	c.t.Helper()
	if len(c.commands) == 0 || !strings.HasPrefix(c.commands[0], begins) {
		c.t.Fatalf("docs/OPERATING.md goes on with %q, want %q", c.commands, begins)
	}
	line := c.commands[0]
	c.commands = c.commands[1:]
	out, err := c.run(line)
	if err != nil {
		c.t.Fatalf("%s: %v\n%s", line, err, out)
	}
	return out
}

// run runs a command line as a shell would. Nodes are left running.
func (c *cluster) run(line string) (out string, err error) {
	c.t.Helper()
	f := strings.Fields(c.replace.Replace(strings.ReplaceAll(line, `"`, "")))
	switch {
	case f[0] == "curl" && f[2] == "-o":
		var body []byte
		if body, err = c.request("GET", f[4], ""); err == nil {
			err = os.WriteFile(f[3], body, 0o600)
		}
		return "", err
	case f[0] == "curl":
		body, err := c.request(f[3], f[4], "")
		return string(body), err
	case f[1] == "run":
		return "", c.start(f[3], f[1:])
	}
	to := ""
	if n := len(f); f[n-2] == ">" {
		f, to = f[:n-2], f[n-1]
	}
	var stdout, stderr bytes.Buffer
	cmd := exec.Command(filepath.Join(c.home, "operate"), f[1:]...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err = cmd.Run(); err == nil && to != "" {
		err = os.WriteFile(to, stdout.Bytes(), 0o600)
	}
	return stdout.String() + stderr.String(), err
}

// start runs a node and waits until it answers.
func (c *cluster) start(id string, args []string) error {
	cmd := exec.Command(filepath.Join(c.home, "operate"), args...)
	out := &bytes.Buffer{}
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		return err
	}
	c.processes[id] = cmd
	c.eventually("node "+id, func() error { _, err := c.request("GET", c.url(id, "/status"), ""); return err })
	return nil
}

func (c *cluster) kill(id string) {
	if p := c.processes[id]; p != nil {
		p.Process.Kill()
		p.Wait()
		delete(c.processes, id)
	}
}

func (c *cluster) killAll() {
	for id := range c.processes {
		c.kill(id)
	}
}

func (c *cluster) url(id, path string) string {
	return c.replace.Replace(fmt.Sprintf("http://10.0.0.%d:8000%s", id[0]-'a'+1, path))
}

func (c *cluster) request(method, url, body string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(c.t.Context(), patience)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, url, strings.NewReader(body))
	if err != nil {
		return nil, err
	}
	r, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err == nil && r.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", r.Status, b)
	}
	return b, err
}

func (c *cluster) eventually(what string, ok func() error) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), patience)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for err := ok(); err != nil; err = ok() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			c.t.Fatalf("%s: waited in vain: %v", what, err)
		}
	}
}

func (c *cluster) put(id, key, value string) {
	c.t.Helper()
	c.eventually("a write", func() error { _, err := c.request("PUT", c.url(id, "/kv/"+key), value); return err })
}

// has checks that a node's state is what it should be.
func (c *cluster) has(id, want string) {
	c.t.Helper()
	c.eventually("a read of "+want, func() error {
		b, err := c.request("GET", c.url(id, "/kv"), "")
		if err == nil && strings.TrimSpace(string(b)) != want {
			err = errors.New(string(b))
		}
		return err
	})
}

// refused runs a command that must fail, with a text that helps.
func (c *cluster) refused(line, want string) {
	c.t.Helper()
	if out, err := c.run(line); err == nil || !strings.Contains(out, want) {
		c.t.Errorf("%s: %v, want %q\n%s", line, err, want, out)
	}
}

func check(t *testing.T, out string, texts ...string) {
	t.Helper()
	for _, text := range texts {
		if !strings.Contains(out, text) {
			t.Errorf("no %q in\n%s", text, out)
		}
	}
}

// Every command of docs/OPERATING.md, in its order: a cluster is backed up and
// restored, loses the disks of two of its three nodes to kill -9, is recovered
// from the third, and grows again. What is unsafe is refused on the way.
func TestOperating(t *testing.T) {
	c := newCluster(t)
	const founders = " -founders a=10.0.0.1:7000,b=10.0.0.2:7000,c=10.0.0.3:7000"
	node := func(id, dir string) string {
		return fmt.Sprintf("operate run -id %s -dir /var/lib/%s -addr 10.0.0.%d:7000 -http 10.0.0.%d:8000", id, dir, id[0]-'a'+1, id[0]-'a'+1)
	}
	run := func(line string) {
		t.Helper()
		if out, err := c.run(line); err != nil {
			t.Fatalf("%s: %v\n%s", line, err, out)
		}
	}
	for _, id := range []string{"a", "b", "c"} {
		run(node(id, "old-"+id) + founders)
	}
	c.put("a", "k", "1")
	c.document("curl")
	check(t, c.document("operate verify"), `"node": "a"`, `"Addr": "`)
	c.put("b", "k", "2") // is not in the backup
	c.killAll()
	check(t, c.document("operate restore"), "was restored from a backup")
	c.refused("operate restore -id a -addr 10.0.0.1:7000 -cluster operate orders.backup /var/lib/orders", "not empty")
	c.document("operate run -id a")
	c.document("operate run -id b")
	c.document("curl")
	run(node("c", "orders-c"))
	run("curl -f -X POST http://10.0.0.1:8000/members/c?addr=10.0.0.3:7000")
	c.has("b", `{"k":"1"}`)
	c.put("c", "l", "3")

	// The disaster: "c" is gone, "b" was stopped before the last write.
	c.kill("b")
	c.put("a", "m", "4")
	c.refused("operate inspect /var/lib/orders", "in use")
	c.refused("operate recover -lost b,c -do /var/lib/orders", "in use")
	run("operate inspect -json /var/lib/orders-b > b.json")
	c.refused("operate recover -lost c -other /var/lib/orders -do /var/lib/orders-b", "in use")
	c.killAll()
	if err := os.RemoveAll(filepath.Join(c.home, "orders-c")); err != nil {
		t.Fatal(err)
	}
	check(t, c.document("operate inspect /var/lib/orders"), `node      "a"`, "voter", "was restored")
	c.document("operate inspect -json")
	check(t, c.document("operate inspect /var/lib/orders b.json"), "are those of a majority", `is `+c.home+`/orders of "a"`)
	c.refused("operate recover -lost c -other b.json /var/lib/orders", "no recovery is needed")
	c.refused("operate recover -lost c -other /var/lib/orders /var/lib/orders-b", `of node "a"`)
	if err := os.RemoveAll(filepath.Join(c.home, "orders-b")); err != nil {
		t.Fatal(err)
	}
	c.refused("operate recover -lost b /var/lib/orders", `"c" is a voter`)
	if err := os.CopyFS(filepath.Join(c.home, "copy"), os.DirFS(filepath.Join(c.home, "orders"))); err != nil {
		t.Fatal(err)
	}
	c.refused("operate recover -lost b,c -do /var/lib/copy", "a copy")
	check(t, c.document("operate recover"), "may have been acknowledged, and are lost", "nothing was changed yet")
	check(t, c.document("operate recover"), "done: it is cluster")
	c.refused("operate recover -lost b,c -do /var/lib/orders", "is the only voter")
	run(node("a", "orders") + founders) // as always
	for _, id := range []string{"b", "c"} {
		run(node(id, "orders-"+id))
		run(fmt.Sprintf("curl -f -X POST http://10.0.0.1:8000/members/%s?addr=10.0.0.%d:7000", id, id[0]-'a'+1))
	}
	c.has("c", `{"k":"1","l":"3","m":"4"}`)
	c.put("b", "n", "5")
	c.has("c", `{"k":"1","l":"3","m":"4","n":"5"}`)
	if len(c.commands) > 0 {
		t.Errorf("not run: %q", c.commands)
	}
}

// What is wrong with a command line is said, with the help.
func TestUsage(t *testing.T) {
	for line, want := range map[string]string{
		"":                      "want a command",
		"destroy":               "want a command",
		"inspect":               "0 arguments",
		"restore x":             "1 arguments",
		"recover -other x.json": "x.json",
		"inspect x.json":        "no such file",
	} {
		if err := command(t.Context(), strings.Fields(line), strings.NewReader(""), io.Discard); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", line, err, want)
		}
	}
}
