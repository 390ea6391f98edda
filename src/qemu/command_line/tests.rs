use proptest::prelude::*;

use super::*;

fn words(line: &str) -> Vec<OsString> {
    line.split_whitespace().map(OsString::from).collect()
}

fn read(line: &str) -> Invocation {
    let is_directory = |path: &Path| path.ends_with("hugepages");
    Invocation::read(OsStr::new("qemu-system-x86_64"), &words(line), false, is_directory).unwrap()
}

fn plan(line: &str) -> Plan {
    match read(line) {
        Invocation::Guest(plan) => plan,
        Invocation::Untouched { why, .. } => panic!("untouched: {why}"),
    }
}

/// The rewritten line: monitors without a descriptor get 50, memory gets those from 60 on.
fn rewritten(line: &str) -> String {
    let plan = plan(line);
    let monitors: Vec<_> = plan.monitors.iter().map(|m| m.fd().unwrap_or(50)).collect();
    let memory: Vec<_> = (60..).take(plan.memory.len()).collect();
    let arguments = plan.arguments(&monitors, &memory);
    let text: Vec<_> = arguments.iter().map(|argument| argument.to_str().unwrap()).collect();
    text.join(" ")
}

const SOCKET: &str = "-qmp unix:/m,server=on,wait=off -machine q35,memory-backend=x";

#[test]
fn what_only_asks_is_left_alone() {
    for line in [
        "-S -no-user-config -nodefaults -nographic -machine none,accel=kvm:tcg -qmp \
         unix:/q,server=on,wait=off -pidfile /p -daemonize",
        "-M none -qmp unix:/q,server",
        "--version",
        "-machine help",
        "-cpu help -qmp tcp:localhost:1,server",
        "-name -qmp unix:/q,server",
        "-mon chardev=m,mode=readline -chardev socket,id=m,path=/q,server=on",
        "-mon chardev=m,mode=control,pretty=on -chardev socket,id=m,path=/q,server=on",
        "-mon chardev=m,mode=control -chardev socket,id=m,host=h,port=1,server=on",
        "-mon chardev=m,mode=control -chardev socket,id=m,path=/q,abstract=on,server=on",
        "-object monitor-qmp,id=o,chardev=m,pretty=on -chardev socket,id=m,path=/q,server=on",
        "-object monitor-qmp,id=o,chardev=m,close-action=delete -chardev socket,id=m,path=/q,server=on",
        "-object monitor-hmp,id=o,chardev=m -chardev socket,id=m,path=/q,server=on",
        "-object monitor-qmp,id=o,chardev=m -chardev pty,id=m",
    ] {
        assert!(matches!(read(line), Invocation::Untouched { .. }), "{line}");
    }
}

#[test]
fn monitors_are_found_in_all_their_forms() {
    let endpoint = |line: &str| {
        let mut plan = plan(line);
        assert_eq!(plan.monitors.len(), 1, "{line}");
        plan.monitors.remove(0).endpoint
    };
    let listen = |wait| Endpoint::Listen { path: "/q".into(), wait };
    assert_eq!(endpoint("-qmp unix:/q,server"), listen(true));
    assert_eq!(endpoint("--qmp unix:/q,server,nowait"), listen(false));
    assert_eq!(
        endpoint("-chardev socket,id=m,path=/q,server=on,wait=off -mon m,mode=control"),
        listen(false)
    );
    assert_eq!(
        endpoint("-chardev socket,id=m,fd=22,server=on,wait=off -mon chardev=m,mode=control"),
        Endpoint::Listening { fd: 22, wait: false }
    );
    assert_eq!(
        endpoint("-chardev socket,id=m,fd=22 -qmp chardev:m"),
        Endpoint::Connected { fd: 22 }
    );
    let object = r#"{"qom-type":"monitor-qmp","id":"o","chardev":"m"}"#;
    for object in ["monitor-qmp,id=o,chardev=m", "qom-type=monitor-qmp,id=o,chardev=m", object] {
        let chardev = "-chardev socket,id=m,path=/q,server=on,wait=off";
        assert_eq!(endpoint(&format!("-object {object} {chardev}")), listen(false));
        let line = rewritten(&format!("{chardev} -object {object} -m 8"));
        let expected = format!("-chardev backend=socket,id=m,fd=50 -object {object} -m 8 ");
        assert!(line.starts_with(&expected), "{line}");
    }
    let connect = |reconnect| Endpoint::Connect { path: "/q".into(), reconnect };
    assert_eq!(endpoint("-qmp unix:/q"), connect(None));
    let again = std::time::Duration::from_secs(3);
    assert_eq!(endpoint("-qmp unix:/q,reconnect=3"), connect(Some(again)));
    assert_eq!(endpoint("-incoming rdma:h:1"), Endpoint::Nobody);
    assert_eq!(plan("-qmp unix:/a,server -qmp unix:/b,server").monitors.len(), 2);
}

/// A client that asks such a monitor for a migration over rdma: gets QEMU's own.
#[test]
fn monitors_that_stay_qemus_own_are_told_of() {
    let notes = |line: &str| {
        let mut notes = match read(line) {
            Invocation::Guest(plan) => plan.notes,
            Invocation::Untouched { notes, .. } => notes,
        };
        notes.retain(|note| note.contains(" monitor of '"));
        notes
    };
    let ours = "-qmp unix:/q,server -m 8";
    let on = |place: &str| format!("-chardev socket,id=m,{place},server=on");
    for (left, why) in [
        ("-monitor stdio".to_owned(), "a human one"),
        ("-serial mon:stdio".into(), "a human one"),
        (format!("-mon m {}", on("path=/h")), "a human one"),
        (format!("-object monitor-hmp,id=o,chardev=m {}", on("path=/h")), "a human one"),
        ("-qmp-pretty unix:/p,server".into(), "for people"),
        (format!("-mon m,mode=control,pretty=on {}", on("path=/p")), "for people"),
        (format!("-object monitor-qmp,id=o,chardev=m,pretty=on {}", on("path=/p")), "for people"),
        ("-qmp tcp:localhost:1,server".into(), "no Unix socket"),
        (format!("-mon m,mode=control {}", on("host=h,port=1")), "no Unix socket"),
        ("-object monitor-qmp,id=o,chardev=elsewhere".into(), "no Unix socket"),
        ("-readconfig /file".into(), "does not read"),
        (
            format!("-object monitor-qmp,id=o,chardev=m,close-action=delete {}", on("path=/d")),
            "it is deleted with its client",
        ),
    ] {
        let option = left.split(" -chardev").next().unwrap();
        for line in [left.clone(), format!("{ours} {left}")] {
            let notes = notes(&line);
            assert_eq!(notes.len(), 1, "{line}: {notes:?}");
            assert!(
                notes[0].contains(&format!("'{option}'")) && notes[0].contains(why),
                "{notes:?}"
            );
        }
    }
    for none in ["-monitor none", "-serial stdio", "-object iothread,id=o", "-parallel none"] {
        assert_eq!(notes(&format!("{ours} {none}")), [""; 0], "{none}");
    }
}

#[test]
fn libvirts_command_line() {
    let line = r#"-name guest=a,debug-threads=on -S -object {"qom-type":"secret","id":"masterKey0","format":"raw","file":"/k"} -machine pc-q35-10.0,usb=off,memory-backend=pc.ram -accel tcg -m size=262144k -object {"qom-type":"memory-backend-ram","id":"pc.ram","size":268435456} -chardev socket,id=charmonitor,fd=22,server=on,wait=off -mon chardev=charmonitor,id=monitor,mode=control -incoming defer"#;
    assert_eq!(
        rewritten(line),
        r#"-name guest=a,debug-threads=on -S -object {"qom-type":"secret","id":"masterKey0","format":"raw","file":"/k"} -machine pc-q35-10.0,usb=off,memory-backend=pc.ram -accel tcg -m size=262144k -object {"qom-type":"memory-backend-file","id":"pc.ram","size":268435456,"share":true,"x-use-canonical-path-for-ramblock-id":false,"mem-path":"/proc/self/fd/60"} -chardev backend=socket,id=charmonitor,fd=22 -mon chardev=charmonitor,id=monitor,mode=control -incoming defer"#
    );
}

#[test]
fn plain_memory_gets_a_backend() {
    let added = "-object qom-type=memory-backend-file,id=pc.ram,size=1073741824,share=on,\
                 x-use-canonical-path-for-ramblock-id=off,mem-path=/proc/self/fd/60 \
                 -machine memory-backend=pc.ram";
    let monitor =
        "-chardev backend=socket,id=qemu-rdma-helper0,fd=50 -qmp chardev:qemu-rdma-helper0";
    for memory in ["-m 1G", "-m 1024", "-m size=1024,slots=2,maxmem=2G -M q35"] {
        let line = rewritten(&format!("{memory} -qmp unix:/q,server,nowait"));
        assert_eq!(line, format!("{memory} {monitor} {added}"));
    }
    let huge = rewritten("-mem-path /dev/hugepages -mem-prealloc -m 1G -qmp unix:/q,server");
    assert_eq!(
        huge,
        format!(
            "-mem-prealloc -m 1G {monitor} {}",
            added.replace("/proc/self/fd/60", "/dev/hugepages")
        )
    );
    assert_eq!(plan("-qmp unix:/q,server").memory[0].size, 128 << 20);
    let twice = rewritten("-mem-path /a -m 1G -mem-path /dev/hugepages -qmp unix:/q,server");
    assert!(twice.starts_with("-m 1G ") && twice.contains("mem-path=/dev/hugepages"), "{twice}");
    // RAM whose name is unknown, RAM that is not the machine's own, confidential RAM, RAM described
    // elsewhere, and RAM that would be left in a file.
    for line in [
        "-M virt",
        "-M q35 -numa node,memdev=a",
        "-M q35,confidential-guest-support=sev0",
        "-M q35,memory.size=1G",
        "-readconfig /file",
        "-mem-path /a/new/file",
    ] {
        assert!(plan(&format!("{line} -qmp unix:/q,server")).memory.is_empty(), "{line}");
    }
}

#[test]
fn settings_of_backends_are_kept() {
    let line = format!(
        "{SOCKET} -object memory-backend-ram,id=x,size=1G,host-nodes=0,host-nodes=2,policy=bind,prealloc=on"
    );
    assert!(rewritten(&line).ends_with(
        "-object qom-type=memory-backend-file,id=x,size=1G,host-nodes=0,host-nodes=2,policy=bind,\
         prealloc=on,share=on,x-use-canonical-path-for-ramblock-id=off,mem-path=/proc/self/fd/60"
    ));
    let object = |object: &str| {
        let line = rewritten(&format!("{SOCKET} -object {object}"));
        line.rsplit(' ').next().unwrap().to_owned()
    };
    assert_eq!(
        object("memory-backend-memfd,id=x,size=1G,hugetlb=on,share=off"),
        "qom-type=memory-backend-memfd,id=x,size=1G,hugetlb=on,share=on"
    );
    assert_eq!(
        object("memory-backend-file,id=x,size=1G,mem-path=/dev/hugepages"),
        "qom-type=memory-backend-file,id=x,size=1G,mem-path=/dev/hugepages,share=on"
    );
    for kept in [
        "memory-backend-memfd,id=x,size=1G",
        "memory-backend-file,id=x,size=1G,mem-path=/a,share=on",
        // Private memory must not be written to a file.
        "memory-backend-file,id=x,size=1G,mem-path=/image",
        "iothread,id=a",
    ] {
        assert_eq!(object(kept), kept);
    }
}

#[test]
fn backends_are_kept_if_that_is_asked_for() {
    let words = words("-m 1G -qmp unix:/q,server=on,wait=off");
    let plan = Invocation::read(OsStr::new("q"), &words, true, |_| false).unwrap();
    let Invocation::Guest(plan) = plan else { panic!() };
    assert!(plan.memory.is_empty());
    assert_eq!(plan.arguments(&[5], &[])[..2], words[..2]);
}

#[test]
fn incoming_rdma_is_ours() {
    let text = rewritten("-incoming rdma:[::]:4444 -qmp unix:/q,server -mem-path /image");
    assert!(text.starts_with("-incoming defer -chardev"), "{text}");
    let address = |line: &str| plan(&format!("{SOCKET} {line}")).incoming.map(|a| a.to_string());
    assert_eq!(address("-incoming rdma:[::]:4444").as_deref(), Some("[::]:4444"));
    let channel = r#"{"channel-type":"main","addr":{"transport":"rdma","host":"h","port":"7"}}"#;
    assert_eq!(address(&format!("-incoming {channel}")).as_deref(), Some("h:7"));
    assert_eq!(address("-incoming tcp:h:1"), None);
    assert_eq!(address("-incoming defer"), None);
    let wrong = words("-incoming rdma:h -qmp unix:/q,server");
    let wrong = Invocation::read(OsStr::new("q"), &wrong, false, |_| false);
    assert!(wrong.unwrap_err().desc.contains("no port"));
}

proptest! {
    #[test]
    fn no_command_line_does_harm(words in prop::collection::vec("(-{0,2}(qmp|mon|m|object|chardev|machine|incoming|numa|mem-path|S))|[a-z0-9=,:/{}\"-]{0,30}", 0..12)) {
        let words: Vec<OsString> = words.into_iter().map(OsString::from).collect();
        if let Ok(Invocation::Guest(plan)) =
            Invocation::read(OsStr::new("q"), &words, false, |_| false)
        {
            let monitors = vec![7; plan.monitors.len()];
            let memory = vec![8; plan.memory.len()];
            plan.arguments(&monitors, &memory);
        }
    }
}
